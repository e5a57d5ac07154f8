"""Paged attention in Triton: keys rotated into pages, queries rotated to each page.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180); online softmax: Milakov & Gimelshein 2018
(arXiv 1805.02867); split over the keys: Dao et al. 2023 (Flash-Decoding).

A row's attention is a left fold over its pages. Each page gives a triple (best score, sum of
weights, weighted values), computed by one tile of fixed shape, and `fold` joins triples in the
order of the table. Whether the fold happens in one program or in `combine`, and which rows stand
beside a row in its tile, changes no operation on it. Kernels are launched without contraction to
fused multiply-adds, so that the elementwise ones mean the same in each of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.model.kernels.common import loaded, operand, rounded

NOTHING = tl.constexpr(-1.0e30)
"""The best score where nothing was seen: finite, so that differences are no NaN."""


@triton.jit
def turns(tables, profile, kind: tl.constexpr):
    """Cosines and sines of a profile, of queries (kind 0) or keys (kind 1).

    tables int64 [num_profiles, 4] holds their addresses: a graph reads what stands there when it is
    replayed.
    """
    at = tables + profile * 4 + 2 * kind
    cos = tl.load(at).to(tl.pointer_type(tl.float32))
    sin = tl.load(at + 1).to(tl.pointer_type(tl.float32))
    return cos, sin


@triton.jit
def store(
    qkv,
    keys,
    values,
    tables,
    profiles,
    row_seq,
    slot_mapping,
    qkv_stride,
    key_block,
    key_head,
    key_slot,
    value_block,
    value_head,
    value_slot,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_size: tl.constexpr,
    half_pad: tl.constexpr,
    rest_pad: tl.constexpr,
    value_pad: tl.constexpr,
    head_tile: tl.constexpr,
    emulated: tl.constexpr,
):
    """Rotate a row's key by its offset in its page and write key and value to their slot.

    grid (num_rows, num_kv_heads / head_tile). A row whose slot is below 0 is absent.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row)
    if slot < 0:
        return
    block = slot // block_size
    offset = slot % block_size
    cos, sin = turns(tables, tl.load(profiles + tl.load(row_seq + row)), 1)
    dtype = keys.dtype.element_ty

    head = tl.program_id(1) * head_tile + tl.arange(0, head_tile)
    present = (head < num_kv_heads)[:, None]
    key = qkv + row * qkv_stride + (num_heads + head[:, None]) * head_dim
    to_key = keys + block * key_block + head[:, None] * key_head + offset * key_slot
    dim = tl.arange(0, half_pad)[None, :]
    mask = present & (dim < half)
    first = tl.load(key + dim, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(key + half + dim, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + offset * half + dim, mask=dim < half, other=0.0)
    s = tl.load(sin + offset * half + dim, mask=dim < half, other=0.0)
    tl.store(to_key + dim, rounded(first * c - second * s, dtype, emulated), mask=mask)
    tl.store(to_key + half + dim, rounded(second * c + first * s, dtype, emulated), mask=mask)
    if rest_pad > 0:
        dim = 2 * half + tl.arange(0, rest_pad)[None, :]
        mask = present & (dim < head_dim)
        tl.store(to_key + dim, tl.load(key + dim, mask=mask, other=0.0), mask=mask)

    dim = tl.arange(0, value_pad)[None, :]
    mask = present & (dim < head_dim)
    value = qkv + row * qkv_stride + (num_heads + num_kv_heads + head[:, None]) * head_dim
    to_value = values + block * value_block + head[:, None] * value_head + offset * value_slot
    tl.store(to_value + dim, tl.load(value + dim, mask=mask, other=0.0), mask=mask)


@triton.jit
def fold(best, total, out, page_best, page_total, page_out):
    """Join what pages so far gave, [n], [n], [n, head_dim], with what the next one gives."""
    highest = tl.maximum(best, page_best)
    old = tl.exp2(best - highest)
    new = tl.exp2(page_best - highest)
    return (
        highest,
        total * old + page_total * new,
        out * old[:, None] + page_out * new[:, None],
    )


@triton.jit(do_not_specialize=["num_seqs", "max_blocks", "pages_per_program"])
def attend(
    qkv,
    out,
    part_out,
    part_best,
    part_total,
    keys,
    values,
    tables,
    profiles,
    tile_seq,
    tile_start,
    query_start,
    positions,
    block_tables,
    bases,
    num_blocks,
    num_seqs,
    max_blocks,
    qkv_stride,
    out_stride,
    key_block,
    key_head,
    key_slot,
    value_block,
    value_head,
    value_slot,
    scale,
    pages_per_program,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half: tl.constexpr,
    block_size: tl.constexpr,
    half_pad: tl.constexpr,
    rest_pad: tl.constexpr,
    value_pad: tl.constexpr,
    tile_rows: tl.constexpr,
    split: tl.constexpr,
    emulated: tl.constexpr,
):
    """Attention of a tile of rows over pages_per_program pages; one head.

    grid (num_tiles, num_heads, parts). A tile is the positions of one sequence whose quotient by
    tile_rows is the same; a row stands at its remainder, whatever else the step computes of that
    tile. split: every page's triple goes to part_*, for `combine`; else there is one part, which
    folds all pages and writes the result.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.load(tile_seq + tile)
    if seq >= num_seqs:
        return
    first_row = tl.load(query_start + seq)
    end_row = tl.load(query_start + seq + 1)
    first_position = tl.load(positions + first_row)
    last_position = first_position + end_row - 1 - first_row
    number = first_position // tile_rows + tile - tl.load(tile_start + seq)
    position = number * tile_rows + tl.arange(0, tile_rows)
    row = (first_row + position - first_position).to(tl.int64)
    live = (position >= first_position) & (position <= last_position)

    # Pages stand in order of position and do not overlap: none after `end` can be seen.
    table = seq * max_blocks
    last_position = tl.minimum(last_position, number * tile_rows + tile_rows - 1)
    seen = (last_position - tl.load(bases + table)) // block_size + 1
    end = tl.minimum(tl.load(num_blocks + seq), seen)
    begin = tl.program_id(2) * pages_per_program
    if split:
        end = tl.minimum(end, begin + pages_per_program)

    cos, sin = turns(tables, tl.load(profiles + seq), 0)
    dtype = keys.dtype.element_ty
    query = qkv + row[:, None] * qkv_stride + head * head_dim
    dim = tl.arange(0, half_pad)[None, :]
    rotated = live[:, None] & (dim < half)
    first = tl.load(query + dim, mask=rotated, other=0.0).to(tl.float32) * scale
    second = tl.load(query + half + dim, mask=rotated, other=0.0).to(tl.float32) * scale
    if rest_pad > 0:
        rest_dim = 2 * half + tl.arange(0, rest_pad)[None, :]
        rest = tl.load(query + rest_dim, mask=live[:, None] & (rest_dim < head_dim), other=0.0)
        rest = operand(rest.to(tl.float32) * scale, dtype, emulated)

    kv_head = head // (num_heads // num_kv_heads)
    slot = tl.arange(0, block_size)
    value_dim = tl.arange(0, value_pad)[None, :]
    best = tl.full([tile_rows], NOTHING, tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    result = tl.zeros([tile_rows, value_pad], tl.float32)
    for page in range(begin, end):
        block = tl.load(block_tables + table + page).to(tl.int64)
        distance = position - tl.load(bases + table + page)
        # The query, rotated by its distance to the page.
        turn = distance[:, None] * half + dim
        mask = rotated & (distance >= 0)[:, None]
        c = tl.load(cos + turn, mask=mask, other=0.0)
        s = tl.load(sin + turn, mask=mask, other=0.0)
        turned_first = operand(first * c - second * s, dtype, emulated)
        turned_second = operand(second * c + first * s, dtype, emulated)

        key = keys + block * key_block + kv_head * key_head + slot[:, None] * key_slot
        key_first = tl.load(key + dim, mask=dim < half, other=0.0)
        key_second = tl.load(key + half + dim, mask=dim < half, other=0.0)
        scores = tl.dot(turned_first, tl.trans(loaded(key_first, emulated)), input_precision="ieee")
        scores = tl.dot(
            turned_second,
            tl.trans(loaded(key_second, emulated)),
            scores,
            input_precision="ieee",
        )
        if rest_pad > 0:
            key_rest = tl.load(key + rest_dim, mask=rest_dim < head_dim, other=0.0)
            scores = tl.dot(
                rest, tl.trans(loaded(key_rest, emulated)), scores, input_precision="ieee"
            )

        visible = slot[None, :] <= distance[:, None]
        scores = tl.where(visible, scores, NOTHING)
        page_best = tl.max(scores, 1)
        weights = tl.where(visible, tl.exp2(scores - page_best[:, None]), 0.0)
        page_total = tl.sum(weights, 1)
        value = values + block * value_block + kv_head * value_head + slot[:, None] * value_slot
        value = tl.load(value + value_dim, mask=value_dim < head_dim, other=0.0)
        page_out = tl.dot(
            operand(weights, dtype, emulated),
            loaded(value, emulated),
            input_precision="ieee",
        )
        if split:
            at = (row * num_heads + head) * max_blocks + page
            tl.store(part_best + at, page_best, mask=live)
            tl.store(part_total + at, page_total, mask=live)
            inside = live[:, None] & (value_dim < head_dim)
            tl.store(part_out + at[:, None] * head_dim + value_dim, page_out, mask=inside)
        else:
            best, total, result = fold(best, total, result, page_best, page_total, page_out)

    if not split:
        result = tl.math.div_rn(result, tl.where(total > 0, total, 1.0)[:, None])
        to = out + row[:, None] * out_stride + head * head_dim + value_dim
        inside = live[:, None] & (value_dim < head_dim)
        tl.store(to, rounded(result, out.dtype.element_ty, emulated), mask=inside)


@triton.jit(do_not_specialize=["max_blocks"])
def combine(
    out,
    part_out,
    part_best,
    part_total,
    row_seq,
    positions,
    bases,
    num_blocks,
    max_blocks,
    out_stride,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    value_pad: tl.constexpr,
    unroll: tl.constexpr,
    emulated: tl.constexpr,
):
    """Fold the triples that `attend` left, in the order of the pages. grid (num_rows, num_heads).

    `unroll` pages are read at once; a page past the end joins as nothing, which changes no bit.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    seq = tl.load(row_seq + row)
    seen = (tl.load(positions + row) - tl.load(bases + seq * max_blocks)) // block_size + 1
    end = tl.minimum(tl.load(num_blocks + seq), seen)
    dim = tl.arange(0, value_pad)[None, :]
    one = tl.arange(0, 1)
    best = tl.full([1], NOTHING, tl.float32)
    total = tl.zeros([1], tl.float32)
    result = tl.zeros([1, value_pad], tl.float32)
    parts = (row * num_heads + head) * max_blocks
    for start in range(0, end, unroll):
        for ahead in tl.static_range(unroll):
            page = start + ahead + one
            at = parts + page
            there = page < end
            page_best = tl.load(part_best + at, mask=there, other=NOTHING)
            page_total = tl.load(part_total + at, mask=there, other=0.0)
            page_out = tl.load(
                part_out + at[:, None] * head_dim + dim,
                mask=there[:, None] & (dim < head_dim),
                other=0.0,
            )
            best, total, result = fold(best, total, result, page_best, page_total, page_out)
    result = tl.math.div_rn(result, tl.where(total > 0, total, 1.0)[:, None])
    to = out + row * out_stride + head * head_dim + dim
    tl.store(to, rounded(result, out.dtype.element_ty, emulated), mask=dim < head_dim)
