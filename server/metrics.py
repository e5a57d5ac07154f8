"""Prometheus metrics of one HTTP process, in a registry of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.frontend.client import AsyncEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class EngineCollector(Collector):
    """The engine's gauges and counters, as its last message told them."""

    def __init__(self, engine: AsyncEngine) -> None:
        """engine: read at each scrape; nothing is copied in between."""
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for. To be called in the engine's event loop."""
        stats = self._engine.stats
        gauges = {
            "num_requests_running": ("Requests that run.", stats.running),
            "num_requests_waiting": ("Requests that wait for their first step.", stats.waiting),
            "open_streams": (
                "Requests that this process has open.",
                self._engine.num_unfinished,
            ),
            "event_loop_tasks": (
                "Tasks of this process's event loop.",
                len(asyncio.all_tasks()),
            ),
            "kv_blocks_used": (
                "Pages of the cache in use.",
                stats.blocks_total - stats.blocks_free,
            ),
            "kv_blocks_free": ("Pages of the cache that nobody holds.", stats.blocks_free),
            "kv_blocks_cached": (
                "Pages that the prefix cache knows, held or not.",
                stats.blocks_cached,
            ),
            "rope_profiles": ("Rotations in force, the model's own among them.", stats.profiles),
        }
        counters = {
            "prompt_tokens": ("Prompt tokens taken in, cached ones included.", stats.prompt_tokens),
            "generation_tokens": ("Tokens generated.", stats.output_tokens),
            "preemptions": ("Requests put back because pages ran out.", stats.preemptions),
            "prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_queries,
            ),
            "prefix_cache_hits": (
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hits,
            ),
            "engine_deaths": (
                "Deaths of the engine process that this process has seen.",
                self._engine.deaths,
            ),
            "engine_steps": ("Steps of the engine.", stats.steps),
        }
        for name, (help_text, value) in gauges.items():
            yield GaugeMetricFamily(f"ropeway_{name}", help_text, value)
        for name, (help_text, value) in counters.items():
            yield CounterMetricFamily(f"ropeway_{name}", help_text, value)


class Metrics:
    """What this process observes, and what the engine tells it."""

    def __init__(self, engine: AsyncEngine) -> None:
        """engine: whose statistics are shown."""
        self._registry = CollectorRegistry()
        self._registry.register(EngineCollector(engine))
        self.requests = Counter(
            "ropeway_requests",
            "Requests by outcome: stop, length, timeout, aborted, error or the code of a refusal.",
            ["outcome"],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "ropeway_time_to_first_token_seconds",
            "From acceptance to the first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "ropeway_inter_token_latency_seconds",
            "Between two tokens of a stream; tokens that came together share the time.",
            buckets=INTER_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.queue_time = Histogram(
            "ropeway_request_queue_time_seconds",
            "From arrival in the engine to the first step.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "ropeway_e2e_request_latency_seconds",
            "From acceptance to the last token.",
            buckets=REQUEST_BUCKETS,
            registry=self._registry,
        )

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)
