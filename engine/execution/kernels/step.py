"""What surrounds the network in a decode step: where its rows stand, and where they stand next.

One program a row, so that a graph has one node for each and not a dozen.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.execution.kernels.penalties import count_token


@triton.jit
def begin(
    positions, block_tables, num_blocks, slots, present, max_blocks, block_size: tl.constexpr
):
    """slots int64: where a row's key and value go, present int32: its pages. grid (num_rows,).

    -1 and 0 where nobody is present: no pages, or none for this position.
    """
    row = tl.program_id(0)
    position = tl.load(positions + row)
    count = tl.load(num_blocks + row)
    there = position < count * block_size
    page = row.to(tl.int64) * max_blocks + position // block_size
    block = tl.load(block_tables + page, mask=there, other=0).to(tl.int64)
    tl.store(slots + row, tl.where(there, block * block_size + position % block_size, -1))
    tl.store(present + row, tl.where(there, count, 0))


@triton.jit
def advance(
    present,
    sampled,
    token_ids,
    positions,
    indices,
    penalties,
    counts,
    sampled_stride,
    counts_width: tl.constexpr,
    not_run: tl.constexpr,
):
    """Each row that was present moves on to the token that it got; the others' is not_run. A token
    that is none (below 0) is not taken over: the network could not look it up. grid (num_rows,)."""
    row = tl.program_id(0)
    there = tl.load(present + row) > 0
    sampled += row * sampled_stride
    token = tl.load(sampled)
    taken = there & (token >= 0)
    tl.store(token_ids + row, token.to(tl.int64), mask=taken)
    tl.store(sampled, not_run, mask=there == 0)
    tl.store(positions + row, tl.load(positions + row) + 1, mask=there)
    tl.store(indices + row, tl.load(indices + row) + 1, mask=there)
    count_token(counts, token, penalties, row, taken, counts_width)
