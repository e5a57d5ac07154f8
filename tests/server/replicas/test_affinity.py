"""Routing by prefix: by the definition, and by what it is for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.replicas.affinity import (
    CHUNK_CHARACTERS,
    CHUNK_TOKENS,
    MOST_KEYS,
    PrefixAffinity,
    prefix_keys,
)


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300))
def test_keys_are_shared_as_far_as_chunks_are(first: list[int], second: list[int]) -> None:
    common = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    shared = sum(a == b for a, b in zip(prefix_keys(first), prefix_keys(second), strict=False))
    assert shared == common // CHUNK_TOKENS


def test_keys_of_texts() -> None:
    text = "x" * (3 * CHUNK_CHARACTERS + 5)
    assert len(prefix_keys(text)) == 3
    assert prefix_keys(text + "y")[:3] == prefix_keys(text)
    assert prefix_keys("y" + text)[0] != prefix_keys(text)[0]
    assert prefix_keys("short") == ()
    assert len(prefix_keys("x" * 10**6)) == MOST_KEYS
    assert prefix_keys("\ud800" * CHUNK_CHARACTERS)  # what no UTF-8 can hold


def test_the_longest_known_beginning_decides() -> None:
    affinity = PrefixAffinity(slack=4)
    affinity.routed((b"1",), "a")
    affinity.routed((b"1", b"2"), "b")
    loads = {"a": 0, "b": 3, "c": 0}
    assert affinity.rank((b"1", b"2", b"3"), loads)[0] == "b"
    assert affinity.rank((b"1", b"9"), loads)[0] == "b"  # the last that got it
    assert affinity.rank((b"9",), loads)[0] in "ac"


def test_overloaded_or_gone() -> None:
    affinity = PrefixAffinity(slack=4)
    affinity.routed((b"1",), "a")
    assert affinity.rank((b"1",), {"a": 3, "b": 0}) == ["a", "b"]
    assert affinity.rank((b"1",), {"a": 4, "b": 0}) == ["b", "a"]
    assert affinity.rank((b"1",), {"b": 0}) == ["b"]
    assert affinity.rank((b"1",), {}) == []


def test_routers_that_know_nothing_agree() -> None:
    loads = {f"replica {number}": 0 for number in range(5)}
    shuffled = dict(sorted(loads.items(), reverse=True))
    chosen = []
    for number in range(500):
        key = (str(number).encode(),)
        chosen.append(PrefixAffinity(8).rank(key, loads)[0])
        assert chosen[-1] == PrefixAffinity(8).rank(key, shuffled)[0]
    assert all(60 < chosen.count(name) < 140 for name in loads)  # and spread evenly


def test_memory_is_bounded_and_the_oldest_goes() -> None:
    affinity = PrefixAffinity(slack=100, capacity=2)
    for key in (b"1", b"2", b"1", b"3"):
        affinity.routed((key,), "a")
    loads = {"a": 50, "b": 0}
    assert [affinity.rank((key,), loads)[0] for key in (b"1", b"2", b"3")] == ["a", "b", "a"]
    with pytest.raises(ValueError, match="got 0 and 1"):
        PrefixAffinity(0, 1)


def test_each_beginning_stays_with_one_replica() -> None:
    """40 beginnings over 4 replicas: nearly every later request finds its pages."""
    rng, affinity = random.Random(6), PrefixAffinity(slack=8)
    pages: dict[str, set[bytes]] = {name: set() for name in "abcd"}
    hits = 0
    for number in range(2000):
        key = prefix_keys([rng.randrange(40)] * CHUNK_TOKENS)
        loads = {name: rng.randrange(4) for name in pages}
        home = affinity.rank(key, loads)[0]
        hits += number >= 200 and key[0] in pages[home]
        pages[home].update(key)
        affinity.routed(key, home)
    assert hits >= 0.99 * 1800
