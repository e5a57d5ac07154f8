"""Prometheus metrics: what the HTTP processes observe, and what the engine tells them.

Names are the field's (vLLM's, with our prefix). With several HTTP processes prometheus_client keeps
each one's values in files that all can read, so a scrape of any of them has the sums, and what a
process that died has counted stays. The engine tells every process everything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from engine.frontend.client import AsyncEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED_DIR_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Where prometheus_client looks for the folder of its files, once, when it is imported."""

FIRST_TOKEN_BUCKETS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
TOKEN_BUCKETS = tuple(4.0**power for power in range(10))


class EngineCollector(Collector):
    """The engine's gauges and counters, as its last message told them."""

    def __init__(self, engine: AsyncEngine) -> None:
        """engine: read at each scrape; nothing is copied in between."""
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """What Prometheus asks for. To be called in the engine's event loop."""
        stats = self._engine.stats
        used = stats.blocks_total - stats.blocks_free
        gauges = {
            "engine_ready": ("1 where the engine could serve now.", self._engine.unready is None),
            "num_requests_running": ("Requests that run.", stats.running),
            "num_requests_waiting": (
                "Requests that wait: for their first step, or put back.",
                stats.waiting,
            ),
            "open_streams": (
                "Requests that this process has open.",
                self._engine.num_unfinished,
            ),
            "event_loop_tasks": (
                "Tasks of this process's event loop.",
                len(asyncio.all_tasks()),
            ),
            "kv_blocks_used": ("Pages of the cache in use.", used),
            "kv_blocks_free": ("Pages of the cache that nobody holds.", stats.blocks_free),
            "kv_blocks_cached": (
                "Pages that the prefix cache knows, held or not.",
                stats.blocks_cached,
            ),
            "kv_cache_usage_perc": (
                "Share of the pages that are in use, 0 to 1.",
                used / stats.blocks_total if stats.blocks_total else 0.0,
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
    """Of one HTTP process, shown together with those of the others."""

    def __init__(self, engine: AsyncEngine, shared_dir: Path | None = None) -> None:
        """engine: whose statistics are shown. shared_dir: where all processes keep their values,
        as SHARED_DIR_VARIABLE has told prometheus_client; None: this process is alone."""
        shared = values.ValueClass.__name__ == "MmapedValue"
        if shared != (shared_dir is not None):
            raise ValueError(f"{SHARED_DIR_VARIABLE} and shared_dir {shared_dir} do not agree")
        registry = CollectorRegistry()
        self._shown = registry if shared_dir is None else CollectorRegistry()
        self._shown.register(EngineCollector(engine))
        if shared_dir is not None:
            MultiProcessCollector(self._shown, str(shared_dir))  # type: ignore[no-untyped-call]  # prometheus_client is half typed
        self.requests = Counter(
            "ropeway_requests",
            "Requests by outcome: stop, length, timeout, aborted, error or the code of a refusal.",
            ["outcome"],
            registry=registry,
        )

        def seconds(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"ropeway_{name}_seconds", help_text, buckets=buckets, registry=registry
            )

        self.first_token = seconds(
            "time_to_first_token", "From acceptance to the first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = seconds(
            "inter_token_latency",
            "Between two tokens of a stream; tokens that came together share the time.",
            INTER_TOKEN_BUCKETS,
        )
        self.queue_time = seconds(
            "request_queue_time",
            "From arrival in the engine to the first step.",
            FIRST_TOKEN_BUCKETS,
        )
        self.prefill_time = seconds(
            "request_prefill_time", "From the first step to the first token.", FIRST_TOKEN_BUCKETS
        )
        self.decode_time = seconds(
            "request_decode_time", "From the first token to the last.", REQUEST_BUCKETS
        )
        self.duration = seconds(
            "e2e_request_latency", "From acceptance to the last token.", REQUEST_BUCKETS
        )
        self.prompt_tokens = Histogram(
            "ropeway_request_prompt_tokens",
            "Prompt tokens of a request.",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )
        self.generation_tokens = Histogram(
            "ropeway_request_generation_tokens",
            "Tokens that a request generated.",
            buckets=TOKEN_BUCKETS,
            registry=registry,
        )

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._shown)
