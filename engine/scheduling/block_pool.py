"""The pages of the cache: which are free, who holds the others, and what is in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.scheduling.prefix_cache import CachedPage, Lineage, Parent, PrefixCache


class BlockPool:
    """Hands out block ids: first those that hold nothing known, then the least recently used.

    Tables refer to blocks by reference counts; a block is free when its count is zero. A free block
    whose page is in the prefix cache keeps its content until it is handed out.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks: pages; block_size: tokens in a page."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._cache = PrefixCache()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks whose page is in the prefix cache, held by somebody or not."""
        return len(self._cache)

    def references(self, block_id: int) -> int:
        """How many tables hold a block."""
        return self._references[block_id]

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take blocks. Asking for more than num_free is a bug of the caller: ValueError."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        block_ids = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in block_ids:
            self._cache.evict(block_id)
            self._references[block_id] = 1
        return block_ids

    def release(self, block_ids: Iterable[int]) -> None:
        """Give references back. Giving back what nobody holds is a bug: ValueError.

        Of a table the last block comes first, so that a prefix is evicted from its end.
        """
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._cache:
                    self._free.move_to_end(block_id, last=False)

    def match(
        self, lineage: Lineage, token_ids: Sequence[int], max_blocks: int
    ) -> list[CachedPage]:
        """The pages, at most max_blocks, that hold the longest known beginning of token_ids."""
        return self._cache.match(lineage, token_ids, self.block_size, max_blocks)

    def num_free_without(self, pages: Iterable[CachedPage]) -> int:
        """Blocks that are left once these pages are shared."""
        return len(self._free) - sum(self._references[page.block_id] == 0 for page in pages)

    def share(self, pages: Iterable[CachedPage]) -> list[int]:
        """Take a reference to each page; their block ids."""
        block_ids = [page.block_id for page in pages]
        for block_id in block_ids:
            self._references[block_id] += 1
            self._free.pop(block_id, None)
        return block_ids

    def remember(self, parent: Parent, token_ids: Sequence[int], block_id: int) -> int | None:
        """Note a full, computed page for others to share; see PrefixCache.insert."""
        return self._cache.insert(parent, token_ids, block_id)
