"""What surrounds the network in a decode step: where its rows stand, and where they stand next.

One program a row, so that a graph has one node for each and not a dozen.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def begin(positions, block_tables, num_blocks, slots, counts, max_blocks, block_size: tl.constexpr):
    """slots int64: where a row's key and value go, counts int32: its pages. grid (num_rows,).

    -1 and 0 where nobody is present: no pages, or none for this position.
    """
    row = tl.program_id(0)
    position = tl.load(positions + row)
    count = tl.load(num_blocks + row)
    present = position < count * block_size
    page = row.to(tl.int64) * max_blocks + position // block_size
    block = tl.load(block_tables + page, mask=present, other=0).to(tl.int64)
    tl.store(slots + row, tl.where(present, block * block_size + position % block_size, -1))
    tl.store(counts + row, tl.where(present, count, 0))


@triton.jit
def advance(counts, sampled, token_ids, positions, indices, not_run: tl.constexpr):
    """Each row that was present moves on to the token that it got; the others' is not_run. A token
    that is none (below 0) is not taken over: the network could not look it up. grid (num_rows,)."""
    row = tl.program_id(0)
    present = tl.load(counts + row) > 0
    token = tl.load(sampled + row)
    tl.store(token_ids + row, token.to(tl.int64), mask=present & (token >= 0))
    tl.store(sampled + row, not_run, mask=present == 0)
    tl.store(positions + row, tl.load(positions + row) + 1, mask=present)
    tl.store(indices + row, tl.load(indices + row) + 1, mask=present)
