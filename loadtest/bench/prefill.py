"""`bench prefill`: prompts alone, beside what the machine's products would allow."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine import LLM
from engine.config import DType
from loadtest.figures import ranged, share, spread
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, offline_document
from loadtest.roofline import Sizes, prefill_limit
from loadtest.workload import Workload, run_offline

COLUMNS: Sequence[Column] = (
    ("prompt tokens", lambda row: str(row["prompt_tokens"])),
    ("tokens/s", lambda row: ranged(row["tokens_per_s"])),
    ("first token ms", lambda row: ranged(row["first_token_ms"])),
    ("limit tokens/s", lambda row: str(row.get("limit_tokens_per_s", ""))),
    ("of limit", lambda row: share(row.get("of_limit"))),
)


def measure(
    model: Path,
    dtype: DType,
    threads: int | None,
    lengths: Sequence[int],
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """One prompt at a time, of each length in turns, up to its first token, in this process.

    No prompt is like another, so none is cached. progress: called repeats + 1 times.
    """
    others = Others()
    llm = LLM(model, dtype=dtype, threads=threads)
    info = llm.info
    sizes = Sizes.of(model, dtype)
    machine = Machine.measure(info.threads)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for repeat in range(repeats + 1):
        for length in lengths:
            workload = Workload(1, length, 2, sizes.vocab_size, seed=length)
            measured = run_offline(llm, workload, repeat)
            if repeat:  # the first run warms up
                seconds[length] += measured.first_token_s
        progress()
    results = []
    for length, each in seconds.items():
        rates = [length / one for one in each]
        result: dict[str, Any] = {
            "prompt_tokens": length,
            "tokens_per_s": spread(rates),
            "first_token_ms": spread([1000 * one for one in each], 2),
        }
        if info.device == "cpu":
            limit = prefill_limit(sizes, machine, length)
            result["limit_tokens_per_s"] = round(limit, 1)
            result["of_limit"] = round(statistics.median(rates) / limit, 3)
        results.append(result)
    return offline_document("prefill", info, machine, others, results, repeats)
