"""A measurement as JSON on standard output, and as a table on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.machine import Machine
from loadtest.others import Others, doubt

Column = tuple[str, Callable[[Mapping[str, Any]], str]]
"""A column's title, and what it shows of a result."""


def document(
    command: str,
    model: Mapping[str, Any],
    machine: Machine,
    others: Others,
    results: Sequence[Mapping[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """What every benchmark prints: what was measured, on what, and what else ran meanwhile."""
    return {
        "command": command,
        "model": dict(model),
        "machine": asdict(machine),
        "load": others.document(),
        **more,
        "results": [dict(each) for each in results],
    }


def report(content: Mapping[str, Any], columns: Sequence[Column], path: Path | None) -> None:
    """Show it. path: a file for the JSON too. Doubts about the figures stand below the table."""
    text = json.dumps(content, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    machine = content["machine"]
    table = Table(
        title=f"{content['command']}: {content['model']['name']}, {content['model']['dtype']}",
        caption=f"{machine['threads']} threads; reads {machine['read_gb_s']} GB/s, multiplies "
        f"{machine['gemm_float32_gflop_s']} (float32) and {machine['gemm_bfloat16_gflop_s']} "
        f"(bfloat16) GFLOP/s; others took {content['load']['others_cores']} cores",
    )
    for at, (title, _) in enumerate(columns):
        table.add_column(title, justify="right" if at else "left")
    for row in content["results"]:
        table.add_row(*(show(row) for _, show in columns))
    console.print(table)
    if warning := doubt(content["load"]):
        console.print(f"warning: {warning}", style="yellow", highlight=False)
