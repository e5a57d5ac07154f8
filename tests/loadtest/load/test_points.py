"""What is counted of a run, and the knee of servers whose knee is known."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from loadtest.load.points import Bounds, Knee, Point, find_knee, percentile
from loadtest.load.report import Report
from loadtest.load.stream import CUT, LEFT, OK, Generation

BOUNDS = Bounds(ttft_ms=500, itl_ms=50, errors=0.01)


def generation(at: float, **fields: object) -> Generation:
    base = {"prompt_tokens": 10, "outcome": OK, "status": 200, "first": 0.1, "total": 1.0}
    return Generation("steady", at, **base | fields)  # type: ignore[arg-type]  # by name


def queue(rate: float, capacity: float = 10.0) -> Point:
    """The mean waiting time of an M/M/1 queue, as every percentile."""
    wait = 1000 / (capacity - rate) if rate < capacity else math.inf
    return Point("steady", rate, 10, 100, rate * 20, (wait,) * 3, (5.0,) * 3, 0.0, 0, {}, 0.0)


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0
    assert percentile([], 0.5) == math.inf


def test_what_is_counted() -> None:
    point = Point.of(
        rate=2.0,
        warmup=1.0,
        seconds=4.0,
        generations=[
            generation(100.0, gaps=[9.0]),  # the warm-up
            generation(101.0, gaps=[0.01, 0.03], cached_tokens=5),
            generation(102.0, gaps=[0.02], outcome=LEFT, first=0.3),
            generation(104.5, outcome=CUT, first=None, total=2.5),
            generation(105.5),  # came after the end
        ],
    )
    assert point.requests == 3
    assert point.ttft == (100.0, 300.0, 300.0)
    assert point.itl == (20.0, 30.0, 30.0)
    # 3 + 2 + 0 tokens, from second 101 to the end of the last request at 107.
    assert point.tokens_per_s == pytest.approx(5 / 6)
    assert (point.left, point.errors) == (1, {"200 connection_lost": 1})
    assert point.cached_share == pytest.approx(5 / 30)
    assert point.broken(BOUNDS) == ["errors 33.3% > 1.0%"]


def test_an_empty_run_is_no_point() -> None:
    with pytest.raises(ValueError, match="no request came"):
        Point.of(1.0, 0.0, 5.0, [])
    with pytest.raises(ValueError, match="after the warm-up"):
        Point.of(1.0, 2.0, 5.0, [generation(100.0)])


@pytest.mark.parametrize("start", [0.5, 2.0, 64.0])
def test_the_knee_of_a_queue(start: float) -> None:
    # 1000 / (10 - rate) <= 500 up to 8 requests/s exactly.
    knee = find_knee(queue, BOUNDS, start, refinements=6)
    assert knee.point is not None
    assert knee.bracketed
    assert 8.0 / 2 ** (0.5**6) <= knee.point.rate <= 8.0
    assert [point.rate for point in knee.points] == sorted(point.rate for point in knee.points)


def test_a_knee_that_is_not_there() -> None:
    nothing = find_knee(lambda rate: queue(rate, 0.0), BOUNDS, 8.0, least=1.0)
    assert nothing.point is None
    assert min(point.rate for point in nothing.points) == 1.0
    all_of_it = find_knee(lambda rate: queue(rate, 1e9), BOUNDS, 1.0, steps=4)
    assert all_of_it.point is not None
    assert (all_of_it.point.rate, all_of_it.bracketed) == (8.0, False)


def test_one_bad_run_is_no_knee() -> None:
    """The first run at each rate breaks the bounds, whatever the rate."""
    tried: list[float] = []

    def measure(rate: float) -> Point:
        tried.append(rate)
        return queue(rate, 10.0 if tried.count(rate) > 1 else 0.0)

    knee = find_knee(measure, BOUNDS, 2.0, refinements=6)
    assert knee.point is not None
    assert 7.9 < knee.point.rate <= 8.0
    assert len(tried) == 2 * len(knee.points)


def test_the_report(tmp_path: Path) -> None:
    knee = find_knee(queue, BOUNDS, 2.0)
    assert knee.point is not None
    slow = generation(0.0, first=0.9, gaps=[0.2])
    point = Point.of(2.0, 0.0, 5.0, [slow])
    report = Report(
        BOUNDS, {"server": "<here>"}, knee, [point], {"steady": [slow]}, ["<doubt>"], 0.0, 20.0
    )
    assert report.failures == [
        f"ramp: {knee.point.rate:.2f} requests/s < 20 asked",
        "steady at 2.00 requests/s: p95 TTFT 900 ms > 500 ms",
        "steady at 2.00 requests/s: p95 inter-token 200.0 ms > 50 ms",
    ]
    assert report.warnings[0] == "<doubt>"
    assert "has 1: its p95" in report.warnings[1]
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "&lt;here&gt;" in page
    assert "&lt;doubt&gt;" in page
    with (tmp_path / "points.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(knee.points) + 1
    assert rows[-1]["ttft_p95_ms"] == "900.0"
    assert Report(BOUNDS, {}, Knee(None, False, ())).failures == ["ramp: no rate keeps the bounds"]


def test_a_report_of_failures_alone(tmp_path: Path) -> None:
    refused = generation(0.0, outcome="queue_full", status=429, first=None)
    point = Point.of(2.0, 0.0, 5.0, [refused])
    report = Report(BOUNDS, {}, None, [point], {"steady": [refused]})
    report.write(tmp_path)
    assert "1 x 429 queue_full" in (tmp_path / "index.html").read_text()
    assert "errors 100.0% > 1.0%" in report.failures[-1]
