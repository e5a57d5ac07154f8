"""`bench latency` and `bench throughput`: the same streams offline and over HTTP, in turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine import LLM
from engine.config import DType
from loadtest.client import run_http
from loadtest.figures import figures, ranged, share
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, offline_document
from loadtest.roofline import Sizes, of_read_limit
from loadtest.servers import ropeway
from loadtest.workload import Measured, Workload, run_offline

COLUMNS: Sequence[Column] = (
    ("path", lambda row: row["path"]),
    ("streams", lambda row: str(row["streams"])),
    ("tokens/s", lambda row: ranged(row["tokens_per_s"])),
    ("decode tokens/s", lambda row: ranged(row["decode_tokens_per_s"])),
    ("of read limit", lambda row: share(row.get("of_read_limit"))),
    ("first token ms", lambda row: ranged(row["first_token_ms"])),
    ("gap ms", lambda row: ranged(row["gap_ms_median"])),
    ("gap ms p95", lambda row: ranged(row["gap_ms_p95"])),
)


def measure(
    command: str,
    model: Path,
    dtype: DType,
    threads: int | None,
    workloads: Sequence[Workload],
    repeats: int,
    http: bool,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Every workload offline, and over HTTP where asked; repeats alternate between the two.

    progress: called repeats + 1 times for each workload.
    """
    others = Others()
    llm = LLM(model, dtype=dtype, threads=threads)
    info = llm.info
    sizes = Sizes.of(model, dtype)
    machine = Machine.measure(info.threads)
    options = ["--dtype", info.dtype, "--threads", str(info.threads)]
    results = []
    with ExitStack() as stack:
        server = stack.enter_context(ropeway(model, *options)) if http else None
        for workload in workloads:
            runs: dict[str, list[Measured]] = {"offline": []}
            if server is not None:
                runs["http"] = []
            for repeat in range(repeats + 1):
                offline = run_offline(llm, workload, repeat)
                over_http = asyncio.run(run_http(server.url, workload, repeat)) if server else None
                if repeat:  # the first run warms up
                    runs["offline"].append(offline)
                    if over_http is not None:
                        runs["http"].append(over_http)
                progress()
            for path, each in runs.items():
                result = {"path": path, **asdict(workload), **figures(each)}
                got = result["decode_tokens_per_s"]["median"]
                results.append(result | of_read_limit(sizes, machine, workload, got))
    return offline_document(command, info, machine, others, results, repeats)
