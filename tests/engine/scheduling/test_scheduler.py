"""The scheduler and the pool, driven without a model."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.messages import EngineOutput, SampledToken, SchedulerOutput, StepResult
from engine.params import RequestOptions, SamplingParams
from engine.request import FinishReason, Request
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.shared import SharedPrefixes


def make(
    num_blocks: int = 32,
    max_num_seqs: int = 4,
    budget: int = 16,
    block_size: int = 4,
    shared: Sequence[Sequence[int]] = (),
) -> Scheduler:
    config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)
    prefixes = SharedPrefixes(shared, block_size)
    return Scheduler(config, BlockPool(num_blocks, block_size), shared=prefixes)


def request(name: str, num_prompt_tokens: int, max_tokens: int = 4) -> Request:
    return Request(
        name,
        list(range(num_prompt_tokens)),
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset({999}),
        options=RequestOptions(cache_salt=name),  # nothing is shared unless a test says so
    )


def step(scheduler: Scheduler, token_id: int = 7) -> tuple[SchedulerOutput, list[EngineOutput]]:
    output = scheduler.schedule()
    sampled = [SampledToken(token_id) for item in output.scheduled if item.samples]
    return output, scheduler.update(output, StepResult(sampled))


def shape(output: SchedulerOutput) -> dict[str, tuple[int, int]]:
    """request id -> (start, number of tokens)"""
    return {item.request.request_id: (item.start, item.num_tokens) for item in output.scheduled}


def test_long_prompt_is_chunked_and_streams_go_on() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("stream", 2, max_tokens=9))
    assert shape(step(scheduler)[0]) == {"stream": (0, 2)}
    scheduler.add(request("long", 20))
    assert shape(step(scheduler)[0]) == {"stream": (2, 1), "long": (0, 7)}
    assert shape(step(scheduler)[0]) == {"stream": (3, 1), "long": (7, 7)}
    output, outputs = step(scheduler)
    assert shape(output) == {"stream": (4, 1), "long": (14, 6)}
    assert [o.request_id for o in outputs] == ["stream", "long"]


def test_older_prompt_does_not_hold_up_a_younger_stream() -> None:
    scheduler = make(budget=8)
    scheduler.add(request("long", 30))
    scheduler.add(request("short", 2, max_tokens=9))
    for _ in range(3):
        step(scheduler)
    output, _ = step(scheduler)
    assert shape(output) == {"long": (24, 6), "short": (0, 2)}
    scheduler.add(request("longer", 40))
    output, _ = step(scheduler)
    assert shape(output)["short"] == (2, 1)


def test_first_come_first_served() -> None:
    scheduler = make(num_blocks=5, max_num_seqs=4, budget=64)
    scheduler.add(request("a", 8))
    scheduler.add(request("big", 16))  # needs four of the three pages that are left
    scheduler.add(request("small", 1))
    assert shape(step(scheduler)[0]) == {"a": (0, 8)}


def test_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make(num_blocks=4, budget=64)
    scheduler.add(request("old", 8, max_tokens=20))  # two pages, full
    scheduler.add(request("young", 7, max_tokens=20))  # two pages, one slot left
    step(scheduler)
    scheduler.add(request("waiting", 1))
    output, _ = step(scheduler)  # both want a third page
    assert shape(output) == {"old": (8, 1)}
    assert output.released == ["young"]
    assert scheduler.stats.preemptions == 1
    scheduler.abort("old")
    output, _ = step(scheduler)
    # One token was generated, and one full page is still there.
    assert shape(output) == {"young": (4, 4), "waiting": (0, 1)}


def test_end_token_and_limit() -> None:
    scheduler = make()
    scheduler.add(request("stops", 2))
    scheduler.add(request("ends", 2, max_tokens=1))
    _, outputs = step(scheduler, token_id=999)
    assert [o.finish_reason for o in outputs] == [FinishReason.STOP, FinishReason.STOP]
    scheduler.add(request("ends", 2, max_tokens=1))
    _, outputs = step(scheduler)
    assert [o.finish_reason for o in outputs] == [FinishReason.LENGTH]
    assert not scheduler.has_unfinished
    assert scheduler.schedule().released == ["ends"]


def test_pool_refuses_misuse() -> None:
    pool = BlockPool(2, 16)
    taken = pool.allocate(2)
    with pytest.raises(ValueError, match="1 blocks asked for, 0 free"):
        pool.allocate(1)
    pool.release(taken)
    with pytest.raises(ValueError, match="is free already"):
        pool.release(taken[:1])


def check_invariants(scheduler: Scheduler, alive: dict[str, Request], block_size: int) -> None:
    """Every block is free or held by exactly one request, which needs it."""
    held = [block for each in alive.values() for block in each.block_table]
    assert len(held) == len(set(held))
    assert scheduler.pool.num_free == scheduler.pool.num_blocks - len(held)
    for each in alive.values():
        assert each.bases == [at * block_size for at in range(len(each.block_table))]
        assert len(each.block_table) <= -(-each.num_tokens // block_size)
        assert each.num_computed_tokens <= len(each.block_table) * block_size


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 20),
    max_num_seqs=st.integers(1, 6),
    extra=st.integers(0, 12),
)
def test_random_lives(seed: int, num_blocks: int, max_num_seqs: int, extra: int) -> None:
    """Arrivals and aborts at random in a tiny pool: tokens in are tokens out, nothing leaks."""
    rng = random.Random(seed)
    block_size = 4
    scheduler = make(num_blocks, max_num_seqs, max_num_seqs + extra, block_size)
    capacity = num_blocks * block_size
    alive: dict[str, Request] = {}
    seen: dict[str, list[int]] = {}
    wanted: dict[str, int] = {}
    for at in range(20_000):  # a budget of one token a step takes its time
        if at < 80 and rng.random() < 0.5:
            num_prompt_tokens = rng.randint(1, capacity)
            max_tokens = rng.randint(1, capacity + 1 - num_prompt_tokens)
            new = request(f"r{at}", num_prompt_tokens, min(max_tokens, 12))
            scheduler.add(new)
            alive[new.request_id], wanted[new.request_id] = new, new.max_tokens
        if alive and rng.random() < 0.1:
            victim = rng.choice(list(alive))
            scheduler.abort(victim)
            del alive[victim], wanted[victim]
        output, outputs = step(scheduler)
        assert output.num_tokens <= scheduler.config.max_num_batched_tokens
        assert scheduler.stats.running <= max_num_seqs
        assert output.scheduled or not alive  # no request waits while it could run
        for one in outputs:
            seen.setdefault(one.request_id, []).append(one.index)
            if one.finish_reason is not None:
                del alive[one.request_id]
        check_invariants(scheduler, alive, block_size)
        if at > 80 and not alive:
            break
    assert not scheduler.has_unfinished
    assert {name: seen[name] for name in wanted} == {
        name: list(range(count)) for name, count in wanted.items()
    }
