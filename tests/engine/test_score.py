"""Scores of given texts: against a naive full recompute, and equal however the work is cut."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from engine import LLM, AsyncEngine, RequestOptions, SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.core import EngineCore
from engine.errors import ContextOverflow, InvalidRequest
from engine.frontend.admission import Admission
from engine.frontend.process import EngineProcess
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, EngineOutput, TokenLogprobs
from engine.model.attention.base import KVCache
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from engine.request import Window
from tests.engine.test_shift import CONFIG as SHORT
from tests.engine.test_shift import WINDOW as SHORT_WINDOW
from tests.engine.test_shift import ShiftedAttention, short_model
from tests.models import EOS, tiny_config
from tests.patience import PATIENCE

CONFIG = tiny_config()
PAGE = KVCache.bytes_per_block(CONFIG, 16, torch.float32)


def texts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random ones; every second begins like the first."""
    rng = random.Random(seed)
    lengths = [longest, 2, 3, *(rng.randrange(2, longest) for _ in range(count - 3))]
    first, *rest = [[rng.randrange(EOS) for _ in range(length)] for length in lengths]
    return [
        first,
        *(first[: len(each)] if at % 2 else each for at, each in enumerate(rest)),
    ]


def of(logprobs: Sequence[TokenLogprobs]) -> torch.Tensor:
    return torch.tensor([each.logprob for each in logprobs])


def test_equals_naive_recompute(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, torch.float32)
    attention = NaiveAttention(RotaryTable.for_model(CONFIG), CONFIG.num_heads)
    llm = LLM(tiny_model_dir, "cpu", "float32", max_num_batched_tokens=64, block_size=16)
    given = texts(8, CONFIG.max_position + 1)
    for score, text in zip(llm.score(given, top=2), given, strict=True):
        logits = model.logits(model(torch.tensor(text[:-1]), attention))[:, : CONFIG.vocab_size]
        logprobs = logits.log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        torch.testing.assert_close(of(score.logprobs), expected, rtol=1e-4, atol=1e-4)
        assert score.token_ids == text
        best = logprobs.max(-1)
        assert [each.top[0][0] for each in score.logprobs] == best.indices.tolist()
        assert [len(each.top) for each in score.logprobs] == [2] * (len(text) - 1)
        assert score.perplexity == pytest.approx(float((-expected).mean().exp()), rel=1e-4)


def add(core: EngineCore, requests: Sequence[AddRequest]) -> dict[str, EngineOutput]:
    for request in requests:
        core.add(request)
    ended = {}
    while core.has_unfinished:
        for output in core.step():
            assert output.request_id not in ended
            ended[output.request_id] = output
    return ended


@pytest.mark.parametrize(
    ("pages", "max_num_seqs", "budget"),
    [(200, 16, 4096), (200, 4, 7), (13, 16, 48)],
    ids=["at once", "chunked", "preempted"],
)
def test_equal_bits_among_others(
    tiny_model_dir: Path, pages: int, max_num_seqs: int, budget: int
) -> None:
    """Alone and in one piece, or as the parameters say, with streams that take the pages away."""

    def engine(pages: int, max_num_seqs: int, budget: int) -> EngineCore:
        return EngineCore(
            EngineConfig(
                model_dir=str(tiny_model_dir),
                device="cpu",
                dtype="float32",
                cache=CacheConfig(block_size=16, kv_memory=pages * PAGE),
                scheduler=SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget),
            )
        )

    core = engine(100, 1, 4096)
    admission = Admission(Tokenizer.from_directory(tiny_model_dir), core.ready)
    given = texts(8, CONFIG.max_position + 1, seed=1)
    alone = {}
    for at, text in enumerate(given):
        options = RequestOptions(cache_salt=str(at))
        alone |= add(core, [admission.admit_score(str(at), text, options, top=1)])
    core = engine(pages, max_num_seqs, budget)
    params = SamplingParams(seed=1, max_tokens=60, ignore_eos=True)
    together = [
        each
        for at, text in enumerate(given)
        for each in (
            admission.admit(f"stream {at}", text[:40], params),
            admission.admit_score(str(at), text, top=1),
        )
    ]
    for each in together:
        core.add(each)
    scores = {}
    while core.has_unfinished:
        for output in core.step():
            if output.scores is not None:
                scores[output.request_id] = output.scores
    assert scores == {name: output.scores for name, output in alone.items()}
    if pages < 20:
        assert core.stats.preemptions > 0
    assert core.stats.blocks_free == core.stats.blocks_total


def test_only_what_is_not_scored_comes_from_the_prefix_cache(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, "cpu", "float32", block_size=16)
    text = texts(3, 150)[0]
    (whole,) = llm.score([text])
    (again,) = llm.score([text])
    assert again == whole
    (rest,) = llm.score([text], first=101)
    assert rest.usage.cached_tokens == 96
    assert (rest.first, rest.logprobs) == (101, whole.logprobs[100:])


def test_shift_scores_through_the_cache_that_drops_pages(tmp_path: Path) -> None:
    """Against attention over what is left of keys that were never moved; with and without sink."""
    llm = LLM(short_model(tmp_path), "cpu", "float32", block_size=16, max_num_batched_tokens=64)
    model = load_model(tmp_path, torch.float32)
    rng = random.Random(4)
    text = [rng.randrange(EOS) for _ in range(4 * SHORT.max_position)]
    seen = []
    for window in (None, Window(16, SHORT_WINDOW.num_blocks, num_sinks=0)):
        attention = ShiftedAttention(0 if window else 1)
        rows = [model(torch.tensor([token_id]), attention) for token_id in text[:-1]]
        logprobs = model.logits(torch.cat(rows))[:, : SHORT.vocab_size].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        (score,) = llm.score([text], RequestOptions(overflow="shift"), window=window)
        torch.testing.assert_close(of(score.logprobs), expected, rtol=1e-4, atol=1e-4)
        seen.append(score.logprobs)
    assert seen[0] != seen[1]
    generated = llm.generate(
        [text[:1]],
        SamplingParams(temperature=0, max_tokens=300, logprobs=0, ignore_eos=True),
        RequestOptions(overflow="shift"),
    )[0]
    scored = llm.score([text[:1] + generated.token_ids], RequestOptions(overflow="shift"))[0]
    assert scored.logprobs == generated.logprobs


def test_what_cannot_be_scored_is_refused(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, "cpu", "float32", kv_memory=4 * PAGE, block_size=16)
    with pytest.raises(InvalidRequest, match=r"more tokens than the 1 before .* got 1"):
        llm.score([[1]])
    with pytest.raises(InvalidRequest, match=r"more tokens than the 5 before .* got 5"):
        llm.score([[1] * 5], first=5)
    with pytest.raises(ContextOverflow, match="text has 194 tokens; the context takes 193"):
        llm.score([[1] * 194])
    with pytest.raises(ContextOverflow, match="text has 66 tokens; the cache of 64 tokens takes"):
        llm.score([[1] * 66])
    assert len(llm.score([[1] * 65])[0].logprobs) == 64
    with pytest.raises(InvalidRequest, match="truncate"):
        llm.score([[1, 2]], RequestOptions(overflow="truncate"))
    with pytest.raises(InvalidRequest, match="texts must be a list"):
        llm.score("ab")
    with pytest.raises(InvalidRequest, match="timeout_s"):
        llm.score([[1] * 60], RequestOptions(timeout_s=1e-9))


async def test_over_the_process_boundary(tiny_model_dir: Path) -> None:
    """The same bits through AsyncEngine, also where the engine dies before they come."""
    config = EngineConfig(model_dir=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)
    given = texts(4, 150)
    expected = [each.logprobs for each in LLM(tiny_model_dir, "cpu", "float32").score(given)]
    process = EngineProcess(config)
    process.start()
    engine = AsyncEngine(
        Tokenizer.from_directory(tiny_model_dir), process.address, max_queue=9, recovers=True
    )
    try:
        await engine.start(process.exit_status)
        streams = [engine.score(str(at), text) for at, text in enumerate(given)]
        (child,) = psutil.Process().children()
        child.kill()
        assert process.wait(PATIENCE) is not None
        process.start()
        async with asyncio.timeout(PATIENCE):
            for stream in streams:
                async for _ in stream:
                    pass
        assert [stream.scores for stream in streams] == expected
    finally:
        await engine.close()
        process.stop()
