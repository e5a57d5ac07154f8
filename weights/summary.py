"""What a conversion did and how it knew: shown, and kept beside what it wrote. No torch here."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

SHOWN = (
    "pairing",
    "rope_sign",
    "rope_base",
    "rotary_dim",
    "max_position",
    "parallel_residual",
    "norm",
    "activation",
    "qk_norm",
    "tie_embeddings",
    "eos_token_id",
)
"""Settings that shapes cannot tell."""


class Summary(msgspec.Struct, frozen=True):
    """settings: (name, value, where it was found); verdict: what a text told, '' if none was asked.

    source, directory: paths. size: bytes of weights.
    """

    source: str
    directory: str
    format: str
    shape: str
    tokenizer: str
    num_tensors: int
    size: int
    settings: list[tuple[str, str, str]]
    verdict: str


def show(summary: Summary, console: Console) -> None:
    """Print it."""
    for line in (
        f"[bold]{summary.directory}[/bold], from {summary.format}",
        f"{summary.shape}; {summary.num_tensors} tensors, {summary.size / 1e6:,.1f} MB; "
        f"tokenizer: {summary.tokenizer}",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    table = Table("setting", "value", "from")
    for row in summary.settings:
        table.add_row(*row)
    console.print(table)
    if summary.verdict:
        console.print(f"verdict: {summary.verdict}", soft_wrap=True, highlight=False)


def found(summary: Summary) -> str:
    """In a line: the rotation, and how it is known."""
    return ", ".join(
        f"{name} {value} ({why})"
        for name, value, why in summary.settings
        if name in ("pairing", "rope_sign", "rope_base", "rotary_dim")
    )
