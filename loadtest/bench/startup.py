"""`bench startup`: from the command to a server that is ready, and to its first token."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import DType
from loadtest.bench.serve import memory_of
from loadtest.client import run_http
from loadtest.figures import ranged, spread
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, document
from loadtest.roofline import Sizes
from loadtest.servers import ropeway
from loadtest.workload import Workload

COLUMNS: Sequence[Column] = (
    ("", lambda row: row["what"]),
    ("seconds", lambda row: ranged(row["seconds"])),
    ("of importing torch and reading the weights", lambda row: str(row["of_limit"])),
)


def measure(
    model: Path,
    dtype: DType,
    threads: int | None,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Start and end a server `repeats` times, files in the system's cache.

    The limit is what nobody who uses torch can avoid: a Python that imports it, measured in turns
    with ours, and reading the weights once. progress: called repeats times.
    """
    others = Others()
    sizes = Sizes.of(model, dtype)
    machine = Machine.measure(threads)
    options = ["--dtype", sizes.dtype]
    options += ["--threads", str(threads)] if threads is not None else []
    seconds: dict[str, list[float]] = {"ready": [], "first token": [], "import torch": []}
    memory = None
    for repeat in range(repeats):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-P", "-c", "import torch"], check=True)
        seconds["import torch"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with ropeway(model, *options) as server:
            seconds["ready"].append(server.ready_s)
            workload = Workload(1, 8, 2, sizes.vocab_size)
            measured = asyncio.run(run_http(server.url, workload, repeat))
            first = measured.started + measured.first_token_s[0]
            seconds["first token"].append(first - start)
            memory = memory_of(server, sizes)
        progress()
    limit = statistics.median(seconds["import torch"])
    limit += sizes.file_bytes / (machine.read_gb_s * 1e9)
    return document(
        "startup",
        {"name": model.name, "parameters": sizes.parameters, "dtype": sizes.dtype},
        machine,
        others,
        [
            {
                "what": what,
                "seconds": spread(each, 2),
                "of_limit": round(statistics.median(each) / limit, 2),
            }
            for what, each in seconds.items()
        ],
        repeats=repeats,
        memory=None if memory is None else asdict(memory),
    )
