"""The same streams, offline through the engine and over HTTP, timed token by token."""

from __future__ import annotations

import asyncio
import math
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import aiohttp

from engine import LLM, SamplingParams


@dataclass(frozen=True)
class Workload:
    """`streams` requests at once; every prompt is random, every output as long as asked."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0

    def prompts(self, repeat: int) -> list[list[int]]:
        """Token ids of each stream's prompt; another set for each repeat."""
        rng = random.Random(f"{self.seed}.{repeat}")
        return [
            [rng.randrange(self.vocab_size) for _ in range(self.prompt_tokens)]
            for _ in range(self.streams)
        ]


@dataclass
class Measured:
    """Seconds: the whole run; per stream, when it was submitted and when each token came."""

    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    arrivals: dict[int, list[float]] = field(default_factory=dict)

    def token(self, stream: int, count: int = 1) -> None:
        """Note tokens of a stream that came now."""
        now = time.perf_counter()
        self.arrivals.setdefault(stream, []).extend([now] * count)
        self.seconds = now - self.started

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all streams over the whole run, prompts included."""
        return sum(map(len, self.arrivals.values())) / self.seconds

    @property
    def first_token_s(self) -> list[float]:
        """Time to first token, by stream."""
        return [times[0] - self.started for times in self.arrivals.values()]

    @property
    def gaps_s(self) -> list[float]:
        """Time between consecutive tokens of a stream, all streams."""
        return [
            later - earlier
            for times in self.arrivals.values()
            for earlier, later in pairwise(times)
        ]

    @property
    def decode_tokens_per_s(self) -> float:
        """Output tokens a second after every stream has had its first, so without the prompts.

        Infinite where the rest came at once: an output too short to be measured.
        """
        begin = max(times[0] for times in self.arrivals.values())
        end = max(times[-1] for times in self.arrivals.values())
        after = sum(at > begin for times in self.arrivals.values() for at in times)
        return after / (end - begin) if end > begin else math.inf


def run_offline(llm: LLM, workload: Workload, repeat: int) -> Measured:
    """All streams through the engine in this process."""
    params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True)
    prompts: list[str | list[int]] = [*workload.prompts(repeat)]
    measured = Measured()
    for stream, _ in llm.stream_all(prompts, params):
        measured.token(stream)
    return measured


async def run_http(url: str, workload: Workload, repeat: int) -> Measured:
    """All streams over HTTP, a connection each."""
    prompts = workload.prompts(repeat)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        measured = Measured()
        await asyncio.gather(
            *(
                _read_stream(session, url, prompt, workload.output_tokens, measured, stream)
                for stream, prompt in enumerate(prompts)
            )
        )
    for stream, times in measured.arrivals.items():
        if len(times) != workload.output_tokens:
            raise RuntimeError(
                f"stream {stream} had {len(times)} tokens, not {workload.output_tokens}"
            )
    return measured


async def _read_stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    max_tokens: int,
    measured: Measured,
    stream: int,
) -> None:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    async with session.post(f"{url}/generate", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"event: token"):
                measured.token(stream)
            elif line.startswith(b"event: error"):
                raise RuntimeError(f"stream {stream} failed: {await response.content.readline()!r}")


@contextmanager
def served(model_dir: Path, options: list[str], timeout: float = 60.0) -> Iterator[str]:
    """A server of its own on a free port, as a process; yields its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "server.cli", "serve", str(model_dir)]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        asyncio.run(_wait_ready(url, process, timeout))
        yield url
    finally:
        process.terminate()
        process.wait()


async def _wait_ready(url: str, process: subprocess.Popen[bytes], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            try:
                async with session.get(f"{url}/ready") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.05)
    raise RuntimeError(f"the server was not ready within {timeout} s")
