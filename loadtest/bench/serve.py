"""`bench serve`: what clients of a server see, alone and while a long prompt arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.config import CacheConfig, DType
from loadtest.bench.gauges import read_gauges
from loadtest.client import ROPEWAY, run_http, session, stream, together
from loadtest.errors import Unmeasurable
from loadtest.figures import figures, ranged, share, spread
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, document
from loadtest.roofline import Sizes, of_read_limit
from loadtest.servers import Server, check_reachable, ropeway
from loadtest.workload import Measured, Workload

COLUMNS: Sequence[Column] = (
    ("", lambda row: row["what"]),
    ("streams", lambda row: str(row["streams"])),
    ("tokens/s", lambda row: ranged(row.get("tokens_per_s"))),
    ("of read limit", lambda row: share(row.get("of_read_limit"))),
    ("first token ms", lambda row: ranged(row.get("first_token_ms"))),
    ("p95", lambda row: ranged(row.get("first_token_ms_p95"))),
    ("gap ms", lambda row: ranged(row.get("gap_ms_median"))),
    ("p95", lambda row: ranged(row.get("gap_ms_p95"))),
    ("longest", lambda row: ranged(row.get("gap_ms_longest"))),
)
SETTLED = 8
"""Tokens that every stream has before the long prompt arrives."""


@dataclass(frozen=True)
class Arrival:
    """A prompt of so many tokens that arrives among running streams."""

    workload: Workload
    prompt_tokens: int

    async def longest_gap_s(self, url: str, repeat: int, arrives: bool) -> float:
        """The longest time between two tokens of a running stream, once all have SETTLED tokens.

        arrives: whether the long prompt comes then; without it the same streams run undisturbed.
        """
        running = Measured()
        settled = asyncio.Event()
        since: list[float] = []

        def arrived(number: int) -> Callable[[int], None]:
            def note(count: int) -> None:
                running.token(number, count)
                times = running.arrivals
                reached = len(times) == self.workload.streams
                reached = reached and min(map(len, times.values())) >= SETTLED
                if reached and not settled.is_set():
                    since.append(times[number][-1])
                    settled.set()

            return note

        async def newcomer() -> None:
            await settled.wait()
            if arrives:
                await stream(http, url, ROPEWAY, long, 2, lambda _: None)

        workload = self.workload
        long = Workload(1, self.prompt_tokens, 2, workload.vocab_size, seed=1).prompts(repeat)[0]
        async with session() as http:
            await together(
                [
                    newcomer(),
                    *(
                        stream(http, url, ROPEWAY, prompt, workload.output_tokens, arrived(number))
                        for number, prompt in enumerate(workload.prompts(repeat))
                    ),
                ]
            )
        return max(
            later - earlier
            for times in running.arrivals.values()
            for earlier, later in pairwise(times)
            if later > since[0]
        )


@dataclass
class Memory:
    """What a server held at most, beside what it must hold."""

    weight_bytes: int
    cache_bytes: int
    peak_bytes: int
    others_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.others_bytes = self.peak_bytes - self.weight_bytes - self.cache_bytes


def memory_of(server: Server, sizes: Sizes) -> Memory | None:
    """Of all the server's processes; None where the system does not tell a process's peak."""
    peak = server.peak_bytes()
    if peak is None:
        return None
    gauges = asyncio.run(read_gauges(server.url))
    blocks = int(gauges["kv_blocks_used"] + gauges["kv_blocks_free"])
    cache = blocks * CacheConfig().block_size * sizes.kv_bytes
    return Memory(sizes.weight_bytes, cache, peak)


def measure(
    model: Path,
    dtype: DType,
    threads: int | None,
    url: str | None,
    streams: Sequence[int],
    shape: tuple[int, int],
    arrival_tokens: int,
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Streams in turns, and the largest number of them with and without a long prompt's arrival.

    url: a server of `model` that runs already; else one is started. shape: tokens of each prompt
    and of each output. progress: called repeats + 1 times. Raises Unmeasurable for a server that
    cannot be reached or fails.
    """
    others = Others()
    sizes = Sizes.of(model, dtype)
    workloads = [Workload(n, *shape, sizes.vocab_size) for n in streams]
    if sum(shape) > sizes.max_position + 1:
        raise Unmeasurable(
            f"prompt_tokens + output_tokens is {sum(shape)}; "
            f"the model's context is {sizes.max_position}"
        )
    if shape[1] <= SETTLED:
        raise Unmeasurable(f"output_tokens must exceed {SETTLED}, got {shape[1]}")
    arrival = Arrival(
        Workload(max(streams), *shape, sizes.vocab_size, seed=2),
        min(arrival_tokens, sizes.max_position - 1),
    )
    machine = Machine.measure(threads)
    more: dict[str, Any] = {}

    def run(url: str) -> list[dict[str, Any]]:
        check_reachable(url)
        runs: dict[int, list[Measured]] = {count: [] for count in streams}
        gaps: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(repeats + 1):
            for workload in workloads:
                measured = asyncio.run(run_http(url, workload, repeat))
                if repeat:  # the first run warms up
                    runs[workload.streams].append(measured)
            for arrives in (repeat % 2 == 0, repeat % 2 == 1):
                seed = 2 * repeat + arrives  # another set of prompts: none is cached
                gap = asyncio.run(arrival.longest_gap_s(url, seed, arrives))
                if repeat:
                    gaps[arrives].append(1000 * gap)
            progress()
        results = []
        for workload in workloads:
            result = {"what": "streams", **asdict(workload), **figures(runs[workload.streams])}
            got = result["decode_tokens_per_s"]["median"]
            results.append(result | of_read_limit(sizes, machine, workload, got))
        for arrives, each in gaps.items():
            what = f"{arrival.prompt_tokens} tokens arrive" if arrives else "nothing arrives"
            results.append(
                {
                    "what": what,
                    **asdict(arrival.workload),
                    "arrival_tokens": arrival.prompt_tokens if arrives else 0,
                    "gap_ms_longest": spread(each),
                }
            )
        return results

    if url is not None:
        results = run(url.rstrip("/"))
    else:
        options = ["--dtype", sizes.dtype]
        options += ["--threads", str(threads)] if threads is not None else []
        with ropeway(model, *options) as server:
            results = run(server.url)
            memory = memory_of(server, sizes)
            more["memory"] = None if memory is None else asdict(memory)
    return document(
        "serve",
        {"name": model.name, "parameters": sizes.parameters, "dtype": sizes.dtype},
        machine,
        others,
        results,
        server=url or "started for this run",
        repeats=repeats,
        **more,
    )
