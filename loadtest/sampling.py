"""`python -m loadtest.sampling`: from logits to tokens, by the kernel beside torch, as JSON.

The two take turns in one process, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

import torch
import typer

from engine.execution.cpu_draw import KernelDraw
from engine.execution.draw import Draw, draw
from engine.params import SamplingParams
from engine.request import Request
from loadtest.bench.options import counts
from loadtest.turns import in_turns

CASES: dict[str, SamplingParams] = {
    "temperature 1": SamplingParams(),
    "top_k 40": SamplingParams(temperature=0.8, top_k=40),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "min_p 0.05": SamplingParams(temperature=0.8, min_p=0.05),
    "top_k 40, top_p 0.95": SamplingParams(temperature=0.8, top_k=40, top_p=0.95),
}


def measure(
    params: SamplingParams, num_rows: int, vocab_size: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds for all rows, by each way of drawing."""
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0))
    requests = [
        Request(str(row), [0], params, seed=row, max_tokens=1, stop_token_ids=frozenset())
        for row in range(num_rows)
    ]
    ways: dict[str, Draw] = {"kernel_ms": KernelDraw(), "torch_ms": draw}
    return in_turns(
        {name: partial(way, logits, range(num_rows), requests) for name, way in ways.items()},
        repeats,
    )


def main(
    rows: Annotated[
        Any, typer.Option(parser=counts, metavar="N,...", help="Numbers of rows, by commas.")
    ] = "1,32",
    vocab_size: Annotated[int, typer.Option(help="Logits of a row.", min=2)] = 50257,
    repeats: Annotated[int, typer.Option(help="Samples of each; the median counts.", min=1)] = 9,
    threads: Annotated[int, typer.Option(help="Threads of both.", min=1)] = 2,
) -> None:
    """Time the drawing of one token for each row of random logits (normal, deviation 3)."""
    torch.set_num_threads(threads)
    results: list[dict[str, Any]] = [
        {"case": name, "rows": count, **measure(params, count, vocab_size, repeats)}
        for count in rows
        for name, params in CASES.items()
    ]
    document = {
        "command": "sampling",
        "torch_version": torch.__version__,
        "threads": threads,
        "vocab_size": vocab_size,
        "repeats": repeats,
        "results": results,
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    typer.run(main)
