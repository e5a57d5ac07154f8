"""The streams of a measurement, and what came of them, token by token."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from engine import LLM, SamplingParams


@dataclass(frozen=True)
class Workload:
    """`streams` requests at once; every prompt is random, every output as long as asked."""

    streams: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("streams", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.output_tokens < 2:
            raise ValueError(f"output_tokens must be at least 2, got {self.output_tokens}")

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

    def of(self, stream: int) -> Callable[[int], None]:
        """What notes the tokens of one stream."""
        return lambda count: self.token(stream, count)

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
