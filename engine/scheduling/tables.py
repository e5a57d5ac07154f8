"""What each request holds of the pool: its block table, and what of it others may share."""

from __future__ import annotations

from engine.request import Request
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.prefix_cache import CachedPage, Lineage
from engine.scheduling.profiles import ProfileRows


class BlockTables:
    """Begins, extends, shifts and ends the block tables of requests, for the scheduler.

    A block's base is its place in the table times the block size, also after a shift.
    """

    def __init__(self, pool: BlockPool, profiles: ProfileRows) -> None:
        """profiles: whose rows follow the tables in length."""
        self.pool = pool
        self._profiles = profiles

    def missing(self, request: Request, ahead: int = 0) -> int:
        """Blocks that a request lacks for what can be computed of it now, or so many tokens on."""
        held = request.num_dropped_blocks + len(request.block_table)
        wanted = reach(request, ahead)
        if wanted <= held * self.pool.block_size:  # nearly always
            return 0
        return self.pool.blocks_for(wanted) - held

    def quota(self, request: Request) -> int:
        """Blocks that a request may come to hold."""
        if request.window is not None:
            return request.window.num_blocks
        return self.pool.blocks_for(request.num_prompt_tokens + request.max_tokens - 1)

    def known_pages(self, request: Request) -> list[CachedPage]:
        """Cached pages of a request's beginning; never all of it, since its last token is what the
        next one is computed from, nothing behind which pages were dropped, and nothing that is to
        be scored."""
        max_blocks = (reach(request) - 1) // self.pool.block_size
        if request.next_scored is not None:
            max_blocks = min(max_blocks, request.next_scored // self.pool.block_size)
        return self.pool.match(_lineage(request), request.token_ids, max_blocks)

    def begin(self, request: Request, pages: list[CachedPage]) -> None:
        """Begin a table with cached pages, and extend it over what can be computed."""
        request.block_table = self.pool.share(pages)
        request.bases = [at * self.pool.block_size for at in range(len(pages))]
        request.num_computed_tokens = len(pages) * self.pool.block_size
        request.num_remembered_blocks = len(pages)
        request.prefix = pages[-1].serial if pages else None
        if missing := self.missing(request):
            self.grow(request, missing)

    def look_ahead(self, request: Request) -> None:
        """Extend the table over the next token too, if a block that it needs is free."""
        missing = self.missing(request, ahead=1)
        if 0 < missing <= self.pool.num_free:
            self.grow(request, missing)

    def grow(self, request: Request, missing: int) -> None:
        """Extend the table by so many blocks; each base is where its block begins."""
        for block_id in self.pool.allocate(missing):
            request.bases.append(len(request.block_table) * self.pool.block_size)
            request.block_table.append(block_id)
        self._profiles.cover(request, len(request.block_table) * self.pool.block_size)

    def shift(self, request: Request) -> None:
        """Drop the oldest page after the sinks, if the next token begins one too many.

        The pages after it move forward by one: a base is lower, and no key is touched.
        """
        if request.window is None:
            return
        dropped = request.window.num_dropped_blocks(request.num_computed_tokens)
        if dropped > request.num_dropped_blocks:
            request.num_dropped_blocks += 1
            self.pool.release([request.block_table.pop(request.window.num_sinks)])
            request.bases.pop()

    def remember(self, request: Request) -> None:
        """Offer the pages that a request has filled to others, until it drops one: what comes
        then depends on what was dropped as well."""
        size = self.pool.block_size
        while (
            request.num_dropped_blocks == 0
            and (request.num_remembered_blocks + 1) * size <= request.num_computed_tokens
        ):
            at = request.num_remembered_blocks
            request.num_remembered_blocks += 1
            if at == 0 or request.prefix is not None:
                request.prefix = self.pool.remember(
                    _lineage(request).parent(at, request.prefix),
                    request.token_ids[at * size : (at + 1) * size],
                    request.block_table[at],
                )

    def end(self, request: Request) -> None:
        """Give all of a table back; nothing of the request is computed any more."""
        self.pool.release(reversed(request.block_table))
        request.block_table = []
        request.bases = []
        request.num_computed_tokens = 0


def _lineage(request: Request) -> Lineage:
    """Under the rotation in force, so a new one after each change of that."""
    return Lineage(request.scaling, request.options.cache_salt, request.num_shared_blocks)


def reach(request: Request, ahead: int = 0) -> int:
    """The tokens that may be in the cache after this step, or so many more: all, or up to where
    pages shift."""
    known = len(request.token_ids) + ahead
    if request.window is None:
        return known
    return min(known, request.window.chunk_end(request.num_computed_tokens))
