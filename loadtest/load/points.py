"""What a run of a load came to, the bounds it is held against, the highest rate within them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtest.load.stream import LEFT, Generation

SHARES = (0.5, 0.95, 0.99)
"""Of the percentiles that are reported."""


@dataclass(frozen=True)
class Bounds:
    """A service level: 95 % of first tokens and of inter-token gaps, and the share of errors."""

    ttft_ms: float
    itl_ms: float
    errors: float


@dataclass(frozen=True)
class Point:
    """A scenario at one rate; times in milliseconds, rates per second.

    ttft, itl: percentiles 50, 95 and 99, infinite where no token came. errors: requests by code.
    late_ms: 95 % of requests were sent at most so long after they had come, which is the load
    generator's fault; it counts into ttft.
    """

    scenario: str
    rate: float
    seconds: float
    requests: int
    tokens_per_s: float
    ttft: tuple[float, ...]
    itl: tuple[float, ...]
    cached_share: float
    left: int
    errors: dict[str, int]
    late_ms: float

    @classmethod
    def of(
        cls, rate: float, warmup: float, seconds: float, generations: Sequence[Generation]
    ) -> Point:
        """From the requests that came in the `seconds` after the first `warmup`.

        tokens_per_s: of theirs, over the time until the last of them ended: the load that was
        carried, not the load that was offered. Raises ValueError where no request came at all.
        """
        if not generations:
            raise ValueError(f"no request came in {warmup + seconds:g} s at {rate:g} requests/s")
        begin = min(each.at for each in generations) + warmup
        counted = [each for each in generations if begin <= each.at < begin + seconds]
        if not counted:
            raise ValueError(f"no request came in the {seconds:g} s after the warm-up")
        firsts = [1000 * each.first for each in counted if each.first is not None]
        gaps = [1000 * gap for each in counted for gap in each.gaps]
        ended = max(each.at + each.total for each in counted)
        return cls(
            scenario=counted[0].scenario,
            rate=rate,
            seconds=seconds,
            requests=len(counted),
            tokens_per_s=sum(each.tokens for each in counted) / max(ended - begin, seconds),
            ttft=tuple(percentile(firsts, share) for share in SHARES),
            itl=tuple(percentile(gaps, share) for share in SHARES),
            cached_share=sum(each.cached_tokens for each in counted)
            / sum(each.prompt_tokens for each in counted),
            left=sum(each.outcome == LEFT for each in counted),
            errors=dict(
                Counter(f"{each.status} {each.outcome}" for each in counted if each.failed)
            ),
            late_ms=percentile([1000 * each.late for each in counted], 0.95),
        )

    def broken(self, bounds: Bounds) -> list[str]:
        """Which bounds it does not keep, in words; empty where it keeps all."""
        share = sum(self.errors.values()) / self.requests
        found = []
        if self.ttft[1] > bounds.ttft_ms:
            found.append(f"p95 TTFT {self.ttft[1]:.0f} ms > {bounds.ttft_ms:g} ms")
        if self.itl[1] > bounds.itl_ms:
            found.append(f"p95 inter-token {self.itl[1]:.1f} ms > {bounds.itl_ms:g} ms")
        if share > bounds.errors:
            found.append(f"errors {share:.1%} > {bounds.errors:.1%}")
        return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; inf of none."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.inf


@dataclass(frozen=True)
class Knee:
    """point: at the highest rate that kept the bounds, None where none did.

    bracketed: whether a higher rate was seen to break them; else the knee is higher still.
    """

    point: Point | None
    bracketed: bool
    points: tuple[Point, ...]


def find_knee(
    measure: Callable[[float], Point],
    bounds: Bounds,
    start: float,
    *,
    growth: float = 2.0,
    refinements: int = 3,
    steps: int = 8,
    least: float = 0.0,
) -> Knee:
    """Multiply the rate until the bounds break (or divide it until they hold), then bisect.

    A rate counts as broken when it breaks them twice in a row: whatever else the machine does makes
    a run slower, and never faster. Bisection is geometric: `refinements` of them leave a bracket of
    growth ** (0.5**refinements). steps: how often the rate is multiplied or divided at most; least:
    no lower rate is tried.
    """
    points: list[Point] = []

    def good(rate: float) -> bool:
        point = measure(rate)
        if point.broken(bounds):
            point = measure(rate)
        points.append(point)
        return not point.broken(bounds)

    low: float | None = None
    high: float | None = None
    rate = start
    for _ in range(steps):
        if good(rate):
            low, rate = rate, rate * growth
        else:
            high, rate = rate, rate / growth
        if (low is not None and high is not None) or rate < least:
            break
    if low is not None and high is not None:
        for _ in range(refinements):
            middle = math.sqrt(low * high)
            if good(middle):
                low = middle
            else:
                high = middle
    best = next((point for point in points if point.rate == low), None)
    return Knee(best, high is not None, tuple(sorted(points, key=lambda point: point.rate)))
