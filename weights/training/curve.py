"""The loss curve of a run, from its log to a picture."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a picture in a file; no window, no display

from matplotlib import pyplot


def read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of log.jsonl. A resumed run may have logged a step twice: the last one counts."""
    entries: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        entries[entry["step"], "held_out" in entry] = entry
    return [entries[key] for key in sorted(entries)]


def smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Exponential moving average; share is the weight of the newest value."""
    smoothed: list[float] = []
    for value in values:
        before = smoothed[-1] if smoothed else value
        smoothed.append(before + share * (value - before))
    return smoothed


def stretches(flags: list[bool]) -> list[tuple[int, int]]:
    """First and last place of every unbroken run of true ones."""
    edges = [at for at, (a, b) in enumerate(pairwise([False, *flags, False])) if a != b]
    return [(first, end - 1) for first, end in zip(edges[::2], edges[1::2], strict=True)]


def draw(entries: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out losses against tokens seen; whole contexts are shaded."""
    steps = [entry for entry in entries if "loss" in entry]
    measured = [entry for entry in entries if "held_out" in entry]
    if not steps:
        raise ValueError("the log has no steps yet")
    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    seen = [entry["tokens"] / 1e6 for entry in steps]
    losses = [entry["loss"] for entry in steps]
    axes.plot(seen, losses, color="tab:blue", alpha=0.2, linewidth=0.6)
    axes.plot(seen, smooth(losses), color="tab:blue", label="training mixture (smoothed)")
    names = sorted({name for entry in measured for name in entry["held_out"]})
    for name, colour in zip(names, ("tab:orange", "tab:green", "tab:red"), strict=False):
        points = [entry["held_out"][name] for entry in measured]
        at = [entry["tokens"] / 1e6 for entry in measured]
        axes.plot(at, points, marker="o", markersize=3, color=colour, label=f"held out: {name}")
    label: str | None = "whole contexts"
    for first, last in stretches([e["length"] > steps[0]["length"] for e in steps]):
        axes.axvspan(seen[first], seen[last], color="grey", alpha=0.12, label=label)
        label = None
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(min(losses) - 0.1, 7.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
