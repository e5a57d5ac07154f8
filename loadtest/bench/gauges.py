"""A server's own numbers, from GET /metrics."""

from __future__ import annotations

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from loadtest.client import session
from loadtest.errors import Unmeasurable

PREFIX = "ropeway_"


async def read_gauges(url: str) -> dict[str, float]:
    """The samples without labels, by name without `ropeway_`. Raises Unmeasurable."""
    try:
        async with session() as http, http.get(f"{url}/metrics") as response:
            text = await response.text()
    except aiohttp.ClientError as error:
        raise Unmeasurable(f"{url}/metrics: {error}") from error
    return {
        sample.name.removeprefix(PREFIX): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and not sample.labels
    }
