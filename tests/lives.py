"""Random lives of an engine: requests of every kind that come, go and run out of pages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.grammar import INSTALLED as GRAMMARS
from engine.messages import AddRequest, EngineOutput
from engine.model.attention.base import KVCache
from engine.params import Grammar, SamplingParams
from engine.request import Targets, Window
from engine.scaling import RopeScaling
from tests.models import EOS, tiny_config

SIZE = 16
CONFIG = tiny_config()
PAGE = KVCache.bytes_per_block(CONFIG, SIZE, torch.float32)


@dataclass(frozen=True)
class Lives:
    """arrivals: by step, who comes; aborts: behind which step who leaves."""

    pages: int
    config: SchedulerConfig
    arrivals: dict[int, list[AddRequest]]
    aborts: dict[int, list[str]]

    @classmethod
    def drawn(cls, seed: int) -> Lives:
        """24 requests within 80 steps."""
        rng = random.Random(seed)
        pages = rng.choice([12, 16, 60])
        config = SchedulerConfig(
            max_num_seqs=rng.choice([3, 9]), max_num_batched_tokens=rng.choice([9, 64])
        )
        lives = cls(pages, config, {}, {})
        for number in range(24):
            at = rng.randrange(80)
            lives.arrivals.setdefault(at, []).append(random_request(rng, f"r{number}", pages))
            if rng.random() < 0.2:
                lives.aborts.setdefault(at + rng.randrange(1, 60), []).append(f"r{number}")
        return lives

    @property
    def gone(self) -> set[str]:
        """Who leaves, sooner or later."""
        return {name for names in self.aborts.values() for name in names}


def plain_engine(directory: Path, pages: int, config: SchedulerConfig) -> EngineCore:
    return EngineCore(
        EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            cache=CacheConfig(block_size=SIZE, kv_memory=pages * PAGE),
            scheduler=config,
        )
    )


def random_request(rng: random.Random, name: str, pages: int) -> AddRequest:
    """Of every kind: plain, penalised, biased, told of its log-probabilities; shifted, scored, in
    another rotation, obeying a grammar, alone."""
    capacity = min(CONFIG.max_position, pages * SIZE)
    prompt = [rng.randrange(EOS) for _ in range(rng.choice([1, 3, 15, 16, 17, 40, 90]))]
    prompt = prompt[: capacity - 1]
    kind = rng.choice(["plain"] * 5 + ["shift", "scored", "rope", "grammar"])
    changes: dict[str, object] = {}
    if rng.random() < 0.3:
        changes["frequency_penalty"] = rng.choice([0.5, -0.25])
    if rng.random() < 0.2:
        changes |= {"repetition_penalty": 1.5, "presence_penalty": 0.75}
    if rng.random() < 0.3:
        changes["logit_bias"] = {rng.randrange(EOS): rng.choice([4.0, -8.5]) for _ in range(5)}
    if rng.random() < 0.3:
        changes["logprobs"] = rng.randrange(4)
    if kind == "rope":
        dynamic = RopeScaling(type="dynamic", factor=2.0, original_context=32)  # computed anew
        changes["rope"] = rng.choice([RopeScaling(type="linear", factor=2.0), dynamic, dynamic])
    if kind == "grammar" and GRAMMARS:
        changes["grammar"] = Grammar("regex", "[a-z]{5,20}")
    max_tokens = min(rng.randrange(1, 60), capacity + 1 - len(prompt))
    window = Window(SIZE, 2) if kind == "shift" and pages > 4 else None
    return AddRequest(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.8, 1.3]),
            top_k=rng.choice([0, 0, 5]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
            **changes,  # type: ignore[arg-type]  # by name
        ),
        seed=rng.randrange(2**64),
        max_tokens=max_tokens + 40 if window else max_tokens,
        stop_token_ids=[EOS, *rng.sample(range(EOS), 4)],
        window=window,
        targets=Targets(0, prompt) if kind == "scored" else None,
        choice=rng.randrange(2),
        suspect_at=0 if rng.random() < 0.1 else None,
    )


def drive(
    engine: EngineCore, arrivals: dict[int, list[AddRequest]], aborts: dict[int, list[str]]
) -> dict[str, list[EngineOutput]]:
    """Step until done. aborts: behind which step who leaves."""
    outputs: dict[str, list[EngineOutput]] = {}
    left: set[str] = set()
    step = 0
    while engine.has_unfinished or step <= max(arrivals):
        for request in arrivals.get(step, []):
            engine.add(request)
        for output in engine.step():
            assert output.request_id not in left
            outputs.setdefault(output.request_id, []).append(output)
        for name in aborts.get(step, []):
            left.add(name)
            engine.abort(name)
        step += 1
        assert step < 5000
    return outputs
