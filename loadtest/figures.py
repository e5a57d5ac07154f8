"""What several runs come to: medians, spreads, percentiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from loadtest.workload import Measured


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    """Median, least and most."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(runs: Sequence[Measured]) -> dict[str, Any]:
    """What several runs of one workload come to; each run is one value, then the median counts."""
    first = [[1000 * seconds for seconds in run.first_token_s] for run in runs]
    gaps = [[1000 * gap for gap in run.gaps_s] for run in runs]
    return {
        "tokens_per_s": spread([run.tokens_per_s for run in runs]),
        "decode_tokens_per_s": spread([run.decode_tokens_per_s for run in runs]),
        "first_token_ms": spread([statistics.median(each) for each in first]),
        "first_token_ms_p95": spread([percentile(each, 0.95) for each in first]),
        "gap_ms_median": spread([statistics.median(each) for each in gaps], 2),
        "gap_ms_p95": spread([percentile(each, 0.95) for each in gaps], 2),
    }


def ranged(value: dict[str, float] | None) -> str:
    """A spread as a table shows it."""
    return "" if value is None else f"{value['median']} ({value['min']}-{value['max']})"


def share(value: float | None) -> str:
    """A ratio in percent, as a table shows it."""
    return "" if value is None else f"{100 * value:.0f} %"
