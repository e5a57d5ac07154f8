"""Pages are found by the tokens that led to them, and by nothing else."""

from __future__ import annotations

import pytest

from engine.errors import InvalidRequest
from engine.params import RequestOptions, SamplingParams
from engine.request import Request
from engine.scaling import UNSCALED, RopeScaling
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.prefix_cache import Lineage, PrefixCache
from engine.scheduling.scheduler import Scheduler
from tests.engine.scheduling.test_scheduler import make, shape, step

ROOT = (UNSCALED, "")
PLAIN = Lineage(UNSCALED, "")


def request(
    name: str,
    tokens: list[int],
    max_tokens: int = 2,
    salt: str = "",
) -> Request:
    return Request(
        name,
        tokens,
        SamplingParams(),
        seed=0,
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        options=RequestOptions(cache_salt=salt),
    )


def finish(scheduler: Scheduler) -> None:
    while scheduler.has_unfinished:
        step(scheduler)


class Clash(int):
    """A number whose hash says nothing."""

    def __hash__(self) -> int:
        return 1


def test_equal_hashes_are_told_apart_by_their_tokens() -> None:
    cache = PrefixCache()
    serials = [cache.insert(ROOT, [Clash(n), Clash(n)], n) for n in range(20)]
    assert len(set(serials)) == 20
    for n in range(20):
        (page,) = cache.match(PLAIN, [Clash(n), Clash(n)], 2, 1)
        assert page.block_id == n
    assert cache.match(PLAIN, [Clash(1), Clash(2)], 2, 1) == []


def test_a_page_without_its_parent_is_not_found() -> None:
    cache = PrefixCache()
    first = cache.insert(ROOT, [1, 2], 0)
    assert first is not None
    second = cache.insert((first, ""), [3, 4], 1)
    assert second is not None
    assert [page.block_id for page in cache.match(PLAIN, [1, 2, 3, 4], 2, 2)] == [0, 1]
    cache.evict(0)
    assert cache.insert((first, ""), [3, 4], 2) is None
    again = cache.insert(ROOT, [1, 2], 5)
    assert again != first
    assert [page.block_id for page in cache.match(PLAIN, [1, 2, 3, 4], 2, 2)] == [5]
    cache.evict(1)
    cache.evict(5)
    cache.evict(5)
    assert len(cache) == 0


def test_same_tokens_behind_other_tokens_are_another_page() -> None:
    cache = PrefixCache()
    first = cache.insert(ROOT, [1, 2], 0)
    assert first is not None
    cache.insert((first, ""), [7, 7], 1)
    assert cache.match(PLAIN, [7, 7, 7, 7], 2, 2) == []
    assert cache.match(Lineage(UNSCALED, "salt"), [1, 2], 2, 1) == []
    other = RopeScaling(type="ntk", factor=2)
    assert cache.match(Lineage(other, ""), [1, 2], 2, 1) == []


def test_known_beginning_is_not_computed() -> None:
    scheduler = make(budget=64)
    scheduler.add(request("a", list(range(10))))
    finish(scheduler)
    scheduler.add(request("b", [*range(9), 99, 98]))
    output, outputs = step(scheduler)
    assert shape(output) == {"b": (8, 3)}
    assert outputs[0].cached_tokens == 8
    assert scheduler.stats.prefix_queries == 21
    assert scheduler.stats.prefix_hits == 8


def test_output_is_cached_as_well() -> None:
    scheduler = make(budget=64)
    scheduler.add(request("a", [1, 2, 3], max_tokens=6))  # the sixth token is never computed
    finish(scheduler)
    scheduler.add(request("b", [1, 2, 3, 7, 7, 7, 7, 7, 7]))
    assert shape(step(scheduler)[0]) == {"b": (8, 1)}


def test_last_token_of_a_known_prompt_is_computed() -> None:
    scheduler = make(budget=64)
    scheduler.add(request("a", list(range(8)), max_tokens=5))
    finish(scheduler)
    scheduler.add(request("b", list(range(8))))
    output, outputs = step(scheduler)
    assert shape(output) == {"b": (4, 4)}
    assert outputs[0].index == 0


def test_salts_share_nothing() -> None:
    scheduler = make(budget=64)
    scheduler.add(request("a", list(range(10)), salt="one"))
    finish(scheduler)
    for salt, start in (("two", 0), ("", 0), ("one", 8)):
        scheduler.add(request("b", list(range(10)), salt=salt))
        assert shape(step(scheduler)[0]) == {"b": (start, 10 - start)}
        finish(scheduler)


def test_salts_share_the_whole_pages_of_a_declared_prefix() -> None:
    declared = [1, 2, 3, 4, 5, 6, 7, 8, 9]  # two pages and a token
    scheduler = make(budget=64, shared=[[9, 9, 9, 9], declared])
    own = [50, 51, 52, 53]

    def begins_at(name: str, tokens: list[int], salt: str) -> int:
        """Tokens of a prompt that were found."""
        scheduler.add(request(name, tokens, salt=salt))
        ((start, _),) = shape(step(scheduler)[0]).values()
        finish(scheduler)
        return start

    whole = [*declared, 10, 11, 12, *own, 0]
    assert begins_at("first", whole, "one") == 0
    assert begins_at("same", whole, "one") == 16
    # Neither the rest of the declared prefix nor what follows it is found by another salt.
    assert begins_at("other", whole, "two") == 8
    assert begins_at("none", whole, "") == 8
    assert begins_at("again", whole, "two") == 16
    # From the first page that differs on, nothing is, whatever comes after it.
    differs = [*declared[:4], 0, *declared[5:], 0, 0, 0, 0]
    assert begins_at("differs", differs, "one") == 4
    assert begins_at("differs elsewhere", differs, "two") == 4
    assert begins_at("not at the beginning", [0, *declared, 0, 0, 0], "one") == 0
    assert begins_at("nor there", [0, *declared, 0, 0, 0], "two") == 0


def test_what_was_generated_is_not_shared_though_it_were_declared() -> None:
    scheduler = make(budget=64, shared=[[1, 2, 3, 4, 7, 7, 7, 7]])
    scheduler.add(request("a", [1, 2, 3, 4], max_tokens=6, salt="one"))  # says 7, as all do here
    finish(scheduler)
    for salt, start in (("two", 4), ("one", 8)):  # asked by the first of them, it is
        scheduler.add(request(salt, [1, 2, 3, 4, 7, 7, 7, 7, 7], salt=salt))
        assert shape(step(scheduler)[0]) == {salt: (start, 9 - start)}
        scheduler.abort(salt)


def test_running_requests_share_pages() -> None:
    scheduler = make(num_blocks=8, budget=64)
    scheduler.add(request("a", list(range(9)), max_tokens=9))
    step(scheduler)
    scheduler.add(request("b", list(range(9)), max_tokens=9))
    step(scheduler)
    assert scheduler.stats.blocks_free == 8 - 2 - 2
    scheduler.abort("a")
    assert scheduler.stats.blocks_free == 8 - 3
    scheduler.abort("b")
    assert scheduler.stats.blocks_free == 8


def test_what_holds_nothing_goes_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4, 2)
    a, b, c, d = pool.allocate(4)
    first = pool.remember(ROOT, [1, 2], a)
    assert first is not None
    pool.remember((first, ""), [3, 4], b)
    pool.remember(ROOT, [5, 6], c)
    pool.release([b, a])
    pool.release([c])
    pool.release([d])
    assert pool.num_cached == 3
    pages = pool.match(PLAIN, [1, 2, 3, 4], 2)
    assert pool.num_free_without(pages) == 2
    pool.release(reversed(pool.share(pages)))  # used again: now c is the oldest
    assert [pool.allocate(1) for _ in range(4)] == [[d], [c], [b], [a]]
    assert pool.num_cached == 0


def test_a_preempted_request_finds_its_pages_again() -> None:
    scheduler = make(num_blocks=5, budget=64)
    scheduler.add(request("old", [1] * 8, max_tokens=5))
    scheduler.add(request("young", [2] * 8, max_tokens=9))
    step(scheduler)
    output, _ = step(scheduler)  # both want a third page, one is left
    assert output.released == ["young"]
    finished = []
    while not finished:
        output, outputs = step(scheduler)
        finished = [each for each in outputs if each.finish_reason is not None]
    output, _ = step(scheduler)
    assert shape(output) == {"young": (8, 1)}


def test_salt_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="at most 256 characters, got 257"):
        RequestOptions(cache_salt="x" * 257)
