"""What the operator has declared to be shared by all, however their caches are salted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile


class SharedPrefixes:
    """Beginnings of prompts."""

    def __init__(self, prefixes: Sequence[Sequence[int]], block_size: int) -> None:
        """prefixes: token ids; only their whole pages count."""
        self._prefixes = prefixes
        self._block_size = block_size

    def num_pages(self, prompt: Sequence[int]) -> int:
        """Leading pages of a prompt that lie wholly in one of them."""
        longest = max((_num_equal(prompt, each) for each in self._prefixes), default=0)
        return longest // self._block_size


def _num_equal(some: Sequence[int], others: Sequence[int]) -> int:
    """Leading tokens that two texts have in common."""
    pairs = zip(some, others, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
