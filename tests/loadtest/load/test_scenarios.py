"""Arrivals and lengths are what they say they are."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from scipy import stats

from loadtest.load.scenarios import SCENARIOS, Arrivals, Lengths, Plan

POOL = list(range(100, 200))


def arrivals(process: Arrivals, rate: float, count: int, begin: float = 1e9) -> list[float]:
    rng, now, found = random.Random(1), begin, []
    for _ in range(count):
        now = process.next(now, rate, rng)
        found.append(now)
    return found


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(Arrivals(), 5.0, 4000)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # A float holds a time of today to a quarter of a microsecond.
    assert stats.kstest(gaps, "expon", args=(0, 1 / 5.0)).pvalue > 0.01


def test_bursts_keep_the_rate_and_come_in_their_share() -> None:
    times = arrivals(Arrivals(period_s=8.0, share=0.25), 5.0, 4000)
    assert all(time % 8.0 <= 2.0 + 1e-6 for time in times)
    assert 4000 / (times[-1] - times[0]) == pytest.approx(5.0, rel=0.05)
    inside = [time % 8.0 for time in times]
    assert stats.kstest(inside, "uniform", args=(0, 2.0)).pvalue > 0.01


def test_lengths_are_log_normal_within_their_bounds() -> None:
    rng = random.Random(2)
    drawn = [Lengths(50, 0.5, 10).draw(rng, 1000) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(50, rel=0.05)
    assert min(drawn) >= 10
    assert max(drawn) <= 1000
    with pytest.raises(ValueError, match="do not fit 20 tokens"):
        Lengths(50, 0.5).draw(rng, 20)


@pytest.mark.parametrize("name", SCENARIOS)
def test_plans_fit_the_context_and_repeat(name: str) -> None:
    scenario = SCENARIOS[name]
    rng, again = random.Random(3), random.Random(3)
    for _ in range(300):
        plan = scenario.plan(rng, POOL, 1024)
        assert plan == scenario.plan(again, POOL, 1024)
        assert len(plan.prompt) > 0
        assert len(plan.prompt) + plan.max_tokens <= 1024
        assert set(plan.prompt) <= set(POOL)


def test_each_scenario_has_what_it_is_named_after() -> None:
    def plans(name: str) -> list[Plan]:
        rng = random.Random(4)
        return [SCENARIOS[name].plan(rng, POOL, 1024) for _ in range(1000)]

    beginnings = [plan.prompt[:256] for plan in plans("prefix")]
    shares = sorted((beginnings.count(each) for each in set(beginnings)), reverse=True)
    assert len(shares) == 8
    assert shares[0] / shares[1] == pytest.approx(2.0, rel=0.35)  # Zipf
    long = sum(len(plan.prompt) >= 400 for plan in plans("long"))
    assert 60 < long < 140
    left = sum(plan.leaves_after is not None for plan in plans("impatient"))
    assert 440 < left < 560
