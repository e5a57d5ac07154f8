"""Options that several measurements have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import DType

DEFAULT_MODEL = Path(__file__).parents[2] / "weights" / "default"


def counts(text: str) -> list[int]:
    """Numbers from 1, by commas. typer.BadParameter for anything else."""
    return _numbers(text, 1)


def queue_lengths(text: str) -> list[int]:
    """Numbers from 0, by commas. typer.BadParameter for anything else."""
    return _numbers(text, 0)


def _numbers(text: str, least: int) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise typer.BadParameter(f"must be numbers from {least}, by commas, got {text!r}")
    numbers = [int(part) for part in parts]
    if min(numbers) < least or len(set(numbers)) != len(numbers):
        raise typer.BadParameter(f"must be different numbers from {least}, by commas, got {text!r}")
    return numbers


Model = Annotated[Path, typer.Option(help="Model directory.", show_default="the shipped model")]
Dtype = Annotated[DType, typer.Option(help="auto: as the server chooses.")]
Threads = Annotated[
    int | None, typer.Option(help="Engine threads.", min=1, show_default="one per core")
]
Prompt = Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)]
Output = Annotated[int, typer.Option(help="Tokens generated for each prompt.", min=2)]
Repeats = Annotated[int, typer.Option(help="Runs of each figure; the median counts.", min=1)]
Http = Annotated[bool, typer.Option(help="Measure over HTTP too.")]
Streams = Annotated[
    Any, typer.Option(parser=counts, metavar="N,N,...", help="Streams at once, by commas.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write JSON here as well as to stdout.")]
