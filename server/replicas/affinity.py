"""Which replica gets a request: the one that has its beginning's pages, unless it is overloaded.

Knows nothing of Ray, HTTP or tokenizers: a prompt's beginnings are keys, replicas are names, loads
are numbers of requests under way.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence

CHUNK_TOKENS = 64
"""What a key stands for, of a prompt of token ids: a page, by default."""

CHUNK_CHARACTERS = 256
"""The same of a text, roughly: whoever routes has no tokenizer."""

MOST_KEYS = 256
"""A longer prompt is told apart by its first so many chunks."""


def prefix_keys(prompt: str | Sequence[int]) -> tuple[bytes, ...]:
    """A key for each beginning of whole chunks, the shortest first; 8 bytes each.

    Two prompts share their first n keys exactly where they share their first n chunks (but for
    collisions of 64 bits, which would cost a cache hit and nothing else).
    """
    size = CHUNK_CHARACTERS if isinstance(prompt, str) else CHUNK_TOKENS
    keys: list[bytes] = []
    key = b"text" if isinstance(prompt, str) else b"ids"
    for begin in range(0, min(len(prompt) // size, MOST_KEYS) * size, size):
        chunk = json.dumps(prompt[begin : begin + size]).encode()
        key = hashlib.blake2b(key + chunk, digest_size=8).digest()
        keys.append(key)
    return tuple(keys)


class PrefixAffinity:
    """Remembers which replica got which beginnings, the most recent `capacity` of them.

    slack: a replica that has so many requests more than the least loaded one is overloaded, and
    then a known beginning does not count.
    """

    def __init__(self, slack: int, capacity: int = 1 << 16) -> None:
        """Raises ValueError where slack or capacity are not positive."""
        if slack < 1 or capacity < 1:
            raise ValueError(f"slack and capacity must be at least 1, got {slack} and {capacity}")
        self._slack = slack
        self._capacity = capacity
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def rank(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """All replicas, the best first.

        First the home of the longest known beginning that is among them and not overloaded; then by
        load. Equals are ordered by a hash of the replica and the first key (rendezvous hashing): so
        several routers, which have seen different requests, send a new beginning the same way.
        """
        first = keys[0] if keys else b""
        order = sorted(loads, key=lambda name: (loads[name], _lot(first, name)))
        if not order:
            return []
        for key in reversed(keys):
            home = self._homes.get(key)
            if home is not None and home in loads:
                if loads[home] < loads[order[0]] + self._slack:
                    order.remove(home)
                    order.insert(0, home)
                break
        return order

    def routed(self, keys: Sequence[bytes], replica: str) -> None:
        """Note where a request went: its pages are there from now on."""
        for key in keys:
            self._homes[key] = replica
            self._homes.move_to_end(key)
        while len(self._homes) > self._capacity:
            self._homes.popitem(last=False)


def _lot(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(key + name.encode(), digest_size=8).digest()
