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

from engine.messages import EngineReady
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


def offline_document(
    command: str,
    info: EngineReady,
    machine: Machine,
    others: Others,
    results: Sequence[Mapping[str, Any]],
    repeats: int,
) -> dict[str, Any]:
    """The document of what ran in this process, where the engine says of itself what it is."""
    return document(
        command,
        {"name": info.model, "parameters": info.num_parameters, "dtype": info.dtype},
        machine,
        others,
        results,
        engine={"device": info.device, "attention": info.attention, "threads": info.threads},
        repeats=repeats,
    )


def write(content: Mapping[str, Any], path: Path | None) -> None:
    """As JSON on standard output; path: a file for it too."""
    text = json.dumps(content, indent=2)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


def report(content: Mapping[str, Any], columns: Sequence[Column], path: Path | None) -> None:
    """Write it, and show it as a table; doubts about the figures stand below that."""
    write(content, path)
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
