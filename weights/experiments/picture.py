"""Curves with their spread, as an SVG that follows the reader's light or dark theme."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a picture in a file; no window, no display

from matplotlib import pyplot
from matplotlib.axes import Axes

# Colours that stand for a theme's: replaced in the file by classes that the style sheet defines.
_INK, _PAPER = "#010203", "#fdfefc"
_STYLE = """<style>
.ink { --ink: #1f2933; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { .ink { --ink: #e5eaf0; --paper: #0f1419; } }
</style>"""
_COLOURS = (
    "#2f81f7",
    "#e36209",
    "#2da44e",
    "#cf222e",
    "#a371f7",
    "#8b6f5c",
    "#e85aad",
    "#7d8590",
    "#b3a000",
    "#1fa7b8",
)
"""Readable on white and on black."""


class Curve(NamedTuple):
    """Runs of equal length, and where their points stand."""

    at: Sequence[float]
    runs: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes, by name.

    low, high: what the axis shows; None: all of it. bands: whether runs' least and most are shown.
    """

    title: str
    across: str
    up: str
    curves: Mapping[str, Curve]
    low: float | None = None
    high: float | None = None
    bands: bool = True


def _draw(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for name, (at, runs) in panel.curves.items():
        values = np.array(runs)
        axes.plot(at, values.mean(axis=0), linewidth=1.5, label=name, color=colours[name])
        if panel.bands:
            band = (values.min(axis=0), values.max(axis=0))
            axes.fill_between(at, *band, alpha=0.15, color=colours[name], linewidth=0)
    axes.set(xlabel=panel.across, ylabel=panel.up, title=panel.title)
    axes.set_ylim(bottom=panel.low, top=panel.high)
    axes.grid(alpha=0.2)


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Side by side: the mean of a name's runs as a line; one legend."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.curves))
    colours = {name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(names)}
    with matplotlib.rc_context(
        {
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "grid.color": _INK,
            "figure.facecolor": _PAPER,
            "axes.facecolor": _PAPER,
            "axes.titlesize": "medium",
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "ropeway",  # the same curves are the same file
        }
    ):
        figure, row = pyplot.subplots(
            1, len(panels), figsize=(5.6 * len(panels), 4.8), squeeze=False, layout="constrained"
        )
        for axes, panel in zip(row[0], panels, strict=True):
            _draw(axes, panel, colours)
        handles = {
            label: handle
            for axes in row[0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(),
            handles,
            loc="outside lower center",
            ncols=2 * len(panels),
            frameon=False,
        )
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    path.write_text(_themed(file.getvalue()), encoding="utf-8")


def _themed(svg: str) -> str:
    head, rest = svg.split("<defs>", maxsplit=1)
    head = head.replace("<svg ", '<svg class="ink" ', 1)
    text = f"{head}{_STYLE}\n <defs>{rest}"
    return text.replace(_INK, "var(--ink)").replace(_PAPER, "var(--paper)")
