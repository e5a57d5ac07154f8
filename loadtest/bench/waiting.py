"""`bench queue`: whether those that run are slowed by those that wait."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import DType
from loadtest.bench.gauges import read_gauges
from loadtest.client import ROPEWAY, session, stream
from loadtest.errors import Unmeasurable
from loadtest.figures import ranged, share, spread
from loadtest.machine import Machine
from loadtest.others import Others
from loadtest.report import Column, document
from loadtest.roofline import Sizes, of_read_limit
from loadtest.servers import allow_connections, ropeway
from loadtest.workload import Measured, Workload

COLUMNS: Sequence[Column] = (
    ("waiting", lambda row: str(row["waiting"])),
    ("streams", lambda row: str(row["streams"])),
    ("decode tokens/s", lambda row: ranged(row["decode_tokens_per_s"])),
    ("of read limit", lambda row: share(row.get("of_read_limit"))),
    ("of that with none", lambda row: share(row["of_none_waiting"])),
)
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Queue:
    """Streams that hold all seats of a server, and requests that wait for one."""

    workload: Workload
    waiting: int

    async def tokens_per_s(self, url: str, repeat: int) -> float:
        """Of the running streams, over the second half of their outputs, while the others wait.

        Raises Unmeasurable where that half began before all of them waited.
        """
        workload, half = self.workload, self.workload.output_tokens // 2
        running, full = Measured(), 0.0
        queued = Workload(max(1, self.waiting), 8, 2, workload.vocab_size, seed=1).prompts(repeat)
        async with session() as http:
            streams = [
                asyncio.ensure_future(
                    stream(http, url, ROPEWAY, prompt, workload.output_tokens, running.of(number))
                )
                for number, prompt in enumerate(workload.prompts(repeat))
            ]
            waiting: list[asyncio.Future[None]] = []
            try:
                while len(running.arrivals) < workload.streams:
                    _still_running(streams, "all of them had a seat")
                    await asyncio.sleep(POLL_SECONDS)
                waiting += [
                    asyncio.ensure_future(stream(http, url, ROPEWAY, prompt, 2, lambda _: None))
                    for prompt in queued[: self.waiting]
                ]
                while (await read_gauges(url))["num_requests_waiting"] < self.waiting:
                    _still_running(streams, f"{self.waiting} others waited")
                    await asyncio.sleep(POLL_SECONDS)
                full = time.perf_counter()
                await asyncio.gather(*streams)
            finally:
                for each in (*streams, *waiting):
                    each.cancel()
                await asyncio.gather(*streams, *waiting, return_exceptions=True)
            # served after those who left are gone, so that the next run finds an empty server
            await stream(http, url, ROPEWAY, queued[0], 2, lambda _: None)
        begin = max(times[half] for times in running.arrivals.values())
        end = min(times[-1] for times in running.arrivals.values())
        if full > begin:
            raise Unmeasurable(
                f"{self.waiting} requests waited only after the streams' first {half} tokens; "
                "ask for more output tokens"
            )
        after = sum(begin < at <= end for times in running.arrivals.values() for at in times)
        return after / (end - begin)


def _still_running(streams: Sequence[asyncio.Future[None]], when: str) -> None:
    """Unmeasurable where a stream has ended; its own error where it failed."""
    for each in streams:
        if each.done():
            each.result()
            raise Unmeasurable(f"a stream ended before {when}; ask for more output tokens")


def measure(
    model: Path,
    dtype: DType,
    threads: int | None,
    streams: int,
    queues: Sequence[int],
    shape: tuple[int, int],
    repeats: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """A server with `streams` seats, all taken, and each number of waiting requests in turns.

    shape: tokens of each prompt and of each output. progress: called repeats + 1 times.
    Raises Unmeasurable.
    """
    others = Others()
    sizes = Sizes.of(model, dtype)
    workload = Workload(streams, *shape, sizes.vocab_size)
    machine = Machine.measure(threads)
    rates: dict[int, list[float]] = {count: [] for count in queues}
    options = ["--dtype", sizes.dtype, "--max-num-seqs", str(streams)]
    options += ["--max-queue", str(max(1, *queues) + streams)]
    options += ["--threads", str(threads)] if threads is not None else []
    allow_connections(streams + max(queues))
    with ropeway(model, *options) as server:
        for repeat in range(repeats + 1):
            for place, count in enumerate(queues if repeat % 2 else reversed(queues)):
                seed = repeat * len(queues) + place  # another set of prompts: none is cached
                rate = asyncio.run(Queue(workload, count).tokens_per_s(server.url, seed))
                if repeat:  # the first run warms up
                    rates[count].append(rate)
            progress()
    none = statistics.median(rates[min(queues)])
    results = []
    for count, each in rates.items():
        rate = statistics.median(each)
        result = {
            "waiting": count,
            "streams": streams,
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "decode_tokens_per_s": spread(each),
            "of_none_waiting": round(rate / none, 3),
        }
        results.append(result | of_read_limit(sizes, machine, workload, rate))
    return document(
        "queue",
        {"name": model.name, "parameters": sizes.parameters, "dtype": sizes.dtype},
        machine,
        others,
        results,
        repeats=repeats,
    )
