from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from weights.training.display import Display, chart, shrink


def test_a_chart_is_a_line_from_corner_to_corner() -> None:
    assert chart([3.0, 2.0, 1.0, 0.0], columns=2, lines=1) == ["\u2819\u28a6"]
    assert chart([7.0] * 4, columns=2, lines=2) == ["\u2800\u2800", "\u2809\u2809"]


@pytest.mark.parametrize("count", [1, 3, 7, 100])
def test_shrinking_keeps_the_mean(count: int) -> None:
    values = [float(x) for x in range(42)]
    points = shrink(values, count)
    assert len(points) == min(count, 42)
    if 42 % count == 0:
        assert sum(points) / len(points) == pytest.approx(20.5)


def values(step: int, **more: Any) -> dict[str, Any]:
    return {"loss": 5.0 / step, "step": step, "tokens": 100 * step, "busy": 2.0 * step, **more}


def test_without_a_terminal_a_line_comes_now_and_then() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=200), every=2) as display:
        for step in range(1, 5):
            display.stepped(values(step), end=4)
            display.measured({"held_out": {"alice": 3.25}})
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("step 4: loss 1.250  0.00M tokens  50 tokens per busy second")
    assert lines[1].endswith("held out:  alice 3.250")


def test_in_a_terminal_the_curve_is_drawn() -> None:
    out = io.StringIO()
    with Display(Console(file=out, width=100, force_terminal=True), every=2) as display:
        for step in range(1, 50):
            display.stepped(values(step), end=50)
    drawn = out.getvalue()
    assert any("\u2800" <= character <= "\u28ff" for character in drawn)
    assert "loss 0.102" in drawn
