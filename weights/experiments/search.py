"""A number chosen by what it measures, doubled or halved until the best is no edge."""

from __future__ import annotations

from collections.abc import Callable


def best_number(
    losses: dict[float, float], measure: Callable[[float], float], least: float = 0.0
) -> float:
    """The number of the least loss, neither the greatest nor the least that was tried.

    losses: by number; gets those that are tried in addition. least: nothing below it is tried.
    """
    while True:
        best = min(losses, key=losses.__getitem__)
        edges = {min(losses): best / 2, max(losses): best * 2}
        if best not in edges or edges[best] < least:
            return best
        losses[edges[best]] = measure(edges[best])
