"""Priorities, timeouts and bounded preemption, by a clock that the tests move."""

from __future__ import annotations

from engine.config import SchedulerConfig
from engine.params import RequestOptions, SamplingParams
from engine.request import FinishReason, Request, RequestStatus, Window
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.scheduler import Scheduler
from tests.engine.scheduling.test_scheduler import shape, step


class Clock:
    """Seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(
    clock: Clock, num_blocks: int = 32, max_num_seqs: int = 1, max_preemptions: int = 3
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=64, max_preemptions=max_preemptions
    )
    return Scheduler(config, BlockPool(num_blocks, 4), clock)


def request(
    name: str,
    num_prompt_tokens: int = 2,
    max_tokens: int = 1,
    priority: int = 0,
    timeout_s: float | None = None,
) -> Request:
    return Request(
        name,
        list(range(num_prompt_tokens)),
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        options=RequestOptions(priority=priority, timeout_s=timeout_s, cache_salt=name),
    )


def order(scheduler: Scheduler) -> str:
    """Names of one letter, in the order in which they end."""
    ended = ""
    while scheduler.has_unfinished:
        _, outputs = step(scheduler)
        ended += "".join(each.request_id for each in outputs if each.finish_reason is not None)
    return ended


def test_priority_goes_first_and_equals_in_their_order() -> None:
    scheduler = make(Clock())
    for name, priority in (("a", 0), ("b", 0), ("c", 5), ("d", -1), ("e", 5)):
        scheduler.add(request(name, priority=priority))
    assert order(scheduler) == "ceabd"


def test_who_waits_long_enough_goes_first() -> None:
    """However many of a higher priority come: each point is worth ten seconds, no more."""
    clock = Clock()
    scheduler = make(clock)
    scheduler.add(request("o", priority=0))
    ended = ""
    for _ in range(40):
        for _ in range(2):  # twice as many as can run
            clock.now += 1
            scheduler.add(request(f"n{clock.now}", priority=3))
        _, outputs = step(scheduler)
        ended += "".join(each.request_id[0] for each in outputs)
    assert ended.index("o") == 29  # those that came less than 30 s after it
    assert scheduler.stats.waiting == 41


def test_timeouts_end_what_waits_and_what_runs() -> None:
    clock = Clock()
    scheduler = make(clock)
    scheduler.add(request("runs", 9, max_tokens=20, timeout_s=5))
    scheduler.add(request("waits", timeout_s=3))
    scheduler.add(request("patient"))
    step(scheduler)
    clock.now += 3
    output, outputs = step(scheduler)
    assert shape(output) == {"runs": (9, 1)}
    assert [(o.request_id, o.index, o.token_id, o.finish_reason) for o in outputs] == [
        ("waits", 0, None, FinishReason.TIMEOUT),
        ("runs", 1, 7, None),
    ]
    clock.now += 2
    output, outputs = step(scheduler)  # its pages and its row are free for the next at once
    assert shape(output) == {"patient": (0, 2)}
    assert output.released[-1] == "runs"
    assert [(o.request_id, o.index, o.token_id, o.finish_reason) for o in outputs] == [
        ("runs", 2, None, FinishReason.TIMEOUT),
        ("patient", 0, 7, FinishReason.LENGTH),
    ]
    assert scheduler.stats.blocks_free == scheduler.stats.blocks_total
    assert not scheduler.has_unfinished


def test_a_timeout_after_the_end_is_nothing() -> None:
    clock = Clock()
    scheduler = make(clock)
    scheduler.add(request("a", timeout_s=1))
    scheduler.add(request("b", timeout_s=1))
    step(scheduler)
    scheduler.abort("b")
    clock.now += 5
    assert step(scheduler)[1] == []


def test_lowest_priority_is_preempted_then_the_youngest() -> None:
    scheduler = make(Clock(), num_blocks=8, max_num_seqs=4)
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", 1)):
        scheduler.add(request(name, 8, max_tokens=6, priority=priority))
    step(scheduler)  # eight pages, all full, and each wants a third
    output, _ = step(scheduler)
    assert output.released == ["c", "b"]  # c for a and d, then b for want of anybody lower
    assert sorted(shape(output)) == ["a", "d"]


def test_preemption_is_bounded() -> None:
    """Two that together never fit: neither is put back more than so often, and both end."""
    for bound in (0, 1, 3):
        scheduler = make(Clock(), num_blocks=6, max_num_seqs=4, max_preemptions=bound)
        requests = [request(name, 4, max_tokens=17) for name in "abcdef"]
        for each in requests:
            scheduler.add(each)
        for _ in range(400):
            step(scheduler)
            assert all(each.num_preemptions <= bound for each in requests)
        assert {each.status for each in requests} == {RequestStatus.FINISHED}
        assert all(each.num_output_tokens == 17 for each in requests)


def test_others_pass_one_that_waits_for_pinned_ones() -> None:
    scheduler = make(Clock(), num_blocks=6, max_num_seqs=4)
    first, second = request("a", 4, max_tokens=13), request("b", 4, max_tokens=17)
    first.num_preemptions = second.num_preemptions = 3
    for each in (first, second, request("c", 4, max_tokens=1)):
        scheduler.add(each)
    assert shape(step(scheduler)[0]) == {"a": (0, 4), "c": (0, 4)}
    assert first.pinned
    assert not second.pinned
    while scheduler.has_unfinished:
        step(scheduler)
    assert second.num_output_tokens == 17
    assert scheduler.stats.preemptions == 0


def endless(name: str) -> Request:
    """A stream that shifts in six pages and has no end."""
    return Request(
        name,
        list(range(4)),
        SamplingParams(),
        seed=0,
        max_tokens=10**9,
        stop_token_ids=frozenset(),
        window=Window(4, 6),
    )


def test_others_pass_one_that_waits_for_an_endless_one() -> None:
    """Eight pages, of which six are the endless stream's in the end: three are never free."""
    for suspects in (False, True):
        scheduler = make(Clock(), num_blocks=8, max_num_seqs=4)
        scheduler.add(endless("a"))
        for _ in range(40):
            step(scheduler)
        large, small = request("b", 12), request("c", 4)
        if suspects:
            large.suspect_at = small.suspect_at = 0
        for each in (large, small, request("d", 4)):
            scheduler.add(each)
        for _ in range(3):
            step(scheduler)
        assert scheduler.stats.running == 1
        assert scheduler.stats.waiting == 1
        assert large.status is RequestStatus.WAITING
        scheduler.abort("a")
        step(scheduler)
        assert large.status is RequestStatus.FINISHED
        assert not scheduler.has_unfinished
