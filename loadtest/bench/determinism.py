"""The same requests in every way that an engine may cut its work, compared to the bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine import LLM, Completion, RequestOptions, SamplingParams
from engine.config import DType
from engine.messages import EngineReady

BUDGET = 4096
SHARE = 3
"""The pool of `preempted` holds one in so many of the pages that all requests need together."""


@dataclass(frozen=True)
class Way:
    """How the requests were run, and what came of it. differences: from running alone."""

    name: str
    requests: int
    differences: int
    preemptions: int
    cached_tokens: int


@dataclass(frozen=True)
class Load:
    """Random requests, of which half begin alike, greedy and sampled, with log-probabilities."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    vocab_size: int
    seed: int = 0

    def prompts(self) -> list[str | list[int]]:
        """Token ids; every prompt has its own length, up to prompt_tokens."""
        rng = random.Random(f"determinism.{self.seed}")
        common = [rng.randrange(256, self.vocab_size) for _ in range(self.prompt_tokens)]
        prompts: list[str | list[int]] = []
        for at in range(self.requests):
            length = rng.randint(1, self.prompt_tokens)
            shared = rng.randint(0, length) if at % 2 else 0
            own = [rng.randrange(256, self.vocab_size) for _ in range(length - shared)]
            prompts.append(common[:shared] + own)
        return prompts

    def params(self) -> list[SamplingParams]:
        """One for each prompt."""
        return [
            SamplingParams(
                temperature=(0.0, 0.8, 1.2)[at % 3],
                top_k=(0, 40)[at % 2],
                top_p=(1.0, 0.9, 1.0, 1.0)[at % 4],
                frequency_penalty=(0.0, 0.0, 0.2)[at % 3],
                seed=self.seed + at,
                max_tokens=self.output_tokens,
                ignore_eos=True,
                logprobs=5,
            )
            for at in range(self.requests)
        ]


def outcome(completions: Sequence[Completion]) -> list[object]:
    """What must be equal: every token, every log-probability, every bit."""
    return [(each.token_ids, each.logprobs, each.text) for each in completions]


def compare(
    model: Path,
    dtype: DType,
    threads: int | None,
    load: Load,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run the requests alone and then in four ways together; count what differs.

    progress: called after each of the five.
    """
    prompts, params = load.prompts(), load.params()
    ways: list[Way] = []

    def engine(max_num_seqs: int, budget: int, kv_memory: int | None = None) -> LLM:
        return LLM(
            model,
            dtype=dtype,
            threads=threads,
            kv_memory=kv_memory,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
        )

    def note(name: str, llm: LLM, expected: list[object]) -> None:
        before = llm.stats.preemptions
        completions = llm.generate(prompts, params)
        pairs = zip(outcome(completions), expected, strict=True)
        ways.append(
            Way(
                name,
                len(completions),
                sum(got != wanted for got, wanted in pairs),
                llm.stats.preemptions - before,
                sum(each.usage.cached_tokens for each in completions),
            )
        )
        progress()

    llm = engine(1, BUDGET)
    info = llm.info
    alone: list[object] = []
    for at, pair in enumerate(zip(prompts, params, strict=True)):
        alone += outcome(llm.generate([pair[0]], pair[1], RequestOptions(cache_salt=str(at))))
    progress()
    llm = engine(load.requests, BUDGET)
    note("together", llm, alone)
    note("cached", llm, alone)
    note("chunked", engine(8, 24), alone)
    note("preempted", engine(load.requests, BUDGET, scarce_memory(info, load)), alone)
    return {
        "model": {"name": info.model, "parameters": info.num_parameters},
        "engine": {"dtype": info.dtype, "device": info.device, "attention": info.attention},
        **asdict(load),
        "compared": sum(way.requests for way in ways),
        "differences": sum(way.differences for way in ways),
        "ways": [asdict(way) for way in ways],
    }


def scarce_memory(info: EngineReady, load: Load) -> int:
    """Bytes for a cache in which the requests do not fit together, but each of them does."""
    tokens = load.prompt_tokens + load.output_tokens
    longest = -(-tokens // info.block_size)
    together = load.requests * -(-(load.prompt_tokens // 2 + load.output_tokens) // info.block_size)
    return max(longest, together // SHARE) * (info.kv_bytes // info.num_blocks)
