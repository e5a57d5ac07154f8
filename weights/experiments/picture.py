"""Curves with their spread, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # a picture in a file; no window, no display

from matplotlib import pyplot


def draw_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: Path,
    across: str,
    up: str,
    *,
    at: Sequence[float] | None = None,
    highest: float | None = None,
) -> None:
    """By name, runs of equal length: their mean as a line, least to most as a band.

    at: where the points stand; by default 1, 2, 3, ... highest: the axis ends there.
    """
    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120)
    every = [value for runs in curves.values() for run in runs for value in run]
    for name, runs in curves.items():
        values = np.array(runs)
        points = np.arange(1, values.shape[1] + 1) if at is None else np.array(at)
        (line,) = axes.plot(points, values.mean(axis=0), linewidth=1.4, label=name)
        band = (values.min(axis=0), values.max(axis=0))
        axes.fill_between(points, *band, alpha=0.15, color=line.get_color(), linewidth=0)
    tail = [value for runs in curves.values() for run in runs for value in run[len(run) // 10 :]]
    top = highest if highest is not None else max(tail)
    axes.set(xlabel=across, ylabel=up, ylim=(min(every) - 0.05, top))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
