"""Several ways to the same end, timed in turns: whatever else the machine does falls on all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from loadtest.figures import spread


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if repeat:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: spread(values, 3) for name, values in times.items()}
