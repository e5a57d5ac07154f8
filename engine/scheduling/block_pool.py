"""The pages of the cache: which are free, and who holds the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Hands out block ids, least recently freed first.

    Tables refer to blocks by reference counts; a block is free when its count is zero.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        """num_blocks: pages; block_size: tokens in a page."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold that many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take blocks. Asking for more than num_free is a bug of the caller: ValueError."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        block_ids = [self._free.popleft() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = 1
        return block_ids

    def release(self, block_ids: Iterable[int]) -> None:
        """Give references back. Giving back what nobody holds is a bug: ValueError."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                raise ValueError(f"block {block_id} is free already")
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free.append(block_id)
