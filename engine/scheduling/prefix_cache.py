"""Full pages by the tokens that led to them, so that a prompt's known beginning is not computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from engine.scaling import RopeScaling

Parent = tuple[RopeScaling | int, str]
"""What a page follows: the serial number of another page, or what prefixes begin with, a rotation
in force; and the cache_salt where it enters, else nothing. Not the row that the rotation has: a row
may be another's tomorrow, and pages outlive requests."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """What a request's pages descend from.

    num_shared: so many of its first pages are without the salt. The salt enters once, in the page
    behind them, and all that follows it descends from it.
    """

    scaling: RopeScaling
    salt: str
    num_shared: int = 0

    def parent(self, at: int, follows: int | None) -> Parent:
        """Of the page `at`; follows: the serial number of the page before it, None: the first."""
        return (
            self.scaling if follows is None else follows,
            self.salt if at == self.num_shared else "",
        )


@dataclass(frozen=True, slots=True)
class CachedPage:
    """One full page. serial: never used twice, so it stands for the whole prefix up to here."""

    serial: int
    block_id: int
    parent: Parent
    token_ids: tuple[int, ...]


class PrefixCache:
    """A chain of pages for every prefix.

    A page's key is its parent and its own token ids. Hashing such a key chains the hashes of a
    prefix's blocks (Kwon et al. 2023, 4.3, and vLLM since), and a dictionary compares equal hashes
    by their tokens, so a collision costs time and never an answer. Without its parent a page is not
    found any more: a serial number is never given again.
    """

    def __init__(self) -> None:
        self._pages: dict[tuple[Parent, tuple[int, ...]], CachedPage] = {}
        self._of_block: dict[int, CachedPage] = {}
        self._serials = count(1)
        self._living: set[int] = set()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._of_block

    def __len__(self) -> int:
        return len(self._of_block)

    def match(
        self, lineage: Lineage, token_ids: Sequence[int], block_size: int, max_blocks: int
    ) -> list[CachedPage]:
        """The pages, at most max_blocks, that hold the longest known beginning of token_ids."""
        pages: list[CachedPage] = []
        serial = None
        for at in range(max_blocks):
            content = tuple(token_ids[at * block_size : (at + 1) * block_size])
            page = self._pages.get((lineage.parent(at, serial), content))
            if page is None:
                break
            pages.append(page)
            serial = page.serial
        return pages

    def insert(self, parent: Parent, token_ids: Sequence[int], block_id: int) -> int | None:
        """Note a computed page and return its serial number.

        Where the same prefix is known already, that page's number is returned and block_id is not
        noted. None: the parent is gone, so nobody could find the page.
        """
        if isinstance(parent[0], int) and parent[0] not in self._living:
            return None
        key = (parent, tuple(token_ids))
        page = self._pages.get(key)
        if page is None:
            page = CachedPage(next(self._serials), block_id, *key)
            self._pages[key] = self._of_block[block_id] = page
            self._living.add(page.serial)
        return page.serial

    def evict(self, block_id: int) -> None:
        """Forget a block that is about to hold something else; unknown ones are no error."""
        page = self._of_block.pop(block_id, None)
        if page is not None:
            del self._pages[page.parent, page.token_ids]
            self._living.discard(page.serial)
