"""A run as it goes: progress, and the loss curve in braille dots; plain lines where no terminal is.

Braille cells are two dots wide and four high (Unicode, 28xx), so that a curve of 60 columns has
120 points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Of a cell's dots, by row from the top, the left one and the right one.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_EMPTY = 0x2800


def shrink(values: Sequence[float], count: int) -> list[float]:
    """At most `count` values: the means of equal stretches."""
    if len(values) <= count:
        return list(values)
    edges = [len(values) * part // count for part in range(count + 1)]
    return [math.fsum(values[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]


def chart(values: Sequence[float], columns: int, lines: int) -> list[str]:
    """The values from left to right, the largest on top, `lines` lines of `columns` cells."""
    points = shrink(values, 2 * columns)
    low, high = min(points), max(points)
    height = 4 * lines
    cells = [[0] * columns for _ in range(lines)]
    before: int | None = None
    for x, value in enumerate(points):
        share = (high - value) / (high - low) if high > low else 0.5
        row = min(height - 1, int(share * height))
        # joined to the point before, so that a steep stretch is a line
        start = row if before is None else min(max(before, row - height), row + height)
        for y in range(min(start, row), max(start, row) + 1):
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        before = row
    return ["".join(chr(_EMPTY + cell) for cell in line) for line in cells]


class Display:
    """Watches a run. Use as a context; `console` decides whether it is a terminal."""

    columns, lines = 60, 8

    def __init__(self, console: Console, *, every: int, silent: bool = False) -> None:
        """every: steps between lines where no terminal is; silent: nothing at all."""
        self.console = console
        self.every = every
        self.silent = silent
        self.losses: list[float] = []
        self.held_out: Mapping[str, float] = {}
        self._seen = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None)
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self._render)

    def __enter__(self) -> Display:
        if self._animated:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._animated:
            self._live.stop()

    @property
    def _animated(self) -> bool:
        return self.console.is_terminal and not self.silent

    def _render(self) -> Group:
        parts: list[Any] = [self._progress]
        if self.losses:
            # the first steps, at ln(vocabulary), would flatten all the rest
            shown = self.losses[len(self.losses) // 20 :]
            points = shrink(shown, 2 * self.columns)
            curve = chart(shown, self.columns, self.lines)
            labels = [f"{max(points):8.3f} ", *[" " * 9] * (self.lines - 2), f"{min(points):8.3f} "]
            drawn = (f"{label}{line}" for label, line in zip(labels, curve, strict=True))
            parts.append(Text("\n".join(drawn)))
        parts.append(Text(self._seen))
        return Group(*parts)

    def stepped(self, values: Mapping[str, Any], end: int | None) -> None:
        """A step was done."""
        self.losses.append(values["loss"])
        rate = values["tokens"] / values["busy"] if values["busy"] else 0.0
        held_out = "".join(f"  {name} {loss:.3f}" for name, loss in self.held_out.items())
        self._seen = (
            f"loss {values['loss']:.3f}  {values['tokens'] / 1e6:.2f}M tokens  "
            f"{rate:,.0f} tokens per busy second" + (f"  held out:{held_out}" if held_out else "")
        )
        self._progress.update(self._task, completed=values["step"], total=end)
        if not self._animated and not self.silent and values["step"] % self.every == 0:
            self.console.print(f"step {values['step']:,}: {self._seen}", soft_wrap=True)

    def measured(self, values: Mapping[str, Any]) -> None:
        """Held-out text was scored."""
        self.held_out = values["held_out"]

    def told(self, message: str) -> None:
        """A line above the rest."""
        if not self.silent:
            self.console.print(message)
