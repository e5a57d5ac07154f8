"""Paged attention in plain torch: the contract of the compiled kernel, where there is none.

Online softmax: Milakov & Gimelshein 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.attention.base import (
    Attention,
    AttentionBackend,
    AttentionMetadata,
    KVCache,
    score_scale,
)
from engine.model.profiles import ProfileTables
from engine.model.rope import RotaryTable, rotate

POWER_COEFFICIENTS = (
    0.00015353362,
    0.0013398875,
    0.00961843692,
    0.0555033237,
    0.240226477,
    0.693147182,
    1.0,
)
"""Minimax polynomial of 2^f over |f| <= 1/2 (2e-9 relative), highest power first."""


class TorchBackend(AttentionBackend):
    """The same contract in torch operations, for where nothing was compiled.

    Bits do not depend on the batch because every row is computed in the same place of the same
    shapes: rows stand in tiles of TILE_ROWS at t % TILE_ROWS, absent rows are zeros, and each tile
    meets each page in a product of fixed size. What is not a product is elementwise, made of
    operations that IEEE 754 defines to the last bit: torch's own exp and sum may differ between the
    middle and the ends of the pieces in which threads share a tensor.
    """

    TILE_ROWS = 8
    name = "torch"

    def __init__(self, config: ModelConfig, profiles: ProfileTables, cache: KVCache) -> None:
        super().__init__(config, profiles, cache)
        self.scale = score_scale(config)

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward."""
        return self.bind(metadata)(layer, qkv)

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step: rows are sorted into tiles once, for all layers."""
        return _TorchStep(self, metadata)


class _TorchStep:
    """One step of TorchBackend: where rows stand in tiles, and which pages each tile meets."""

    def __init__(self, backend: TorchBackend, metadata: AttentionMetadata) -> None:
        self._backend = backend
        device, size = metadata.positions.device, backend.TILE_ROWS
        slots = metadata.slot_mapping
        self._block = slots // backend.cache.block_size
        self._offset = slots % backend.cache.block_size

        positions = metadata.positions.long()
        rows_of = metadata.query_start.diff().long()
        seq = torch.repeat_interleave(torch.arange(len(rows_of), device=device), rows_of)
        profiles = metadata.profiles.long()
        self._profile = profiles[seq]
        self._in_force = sorted(set(profiles.tolist()))
        tiles, self._tile = torch.unique_consecutive(
            torch.stack((seq, positions // size)), dim=1, return_inverse=True
        )
        self._place = positions % size
        self._num_tiles = tiles.shape[1]
        tile_positions = tiles[1, :, None] * size + torch.arange(size, device=device)
        self._pages = []
        for page in range(int(metadata.num_blocks.max())):
            base = metadata.bases[tiles[0], page].long()
            meets = (page < metadata.num_blocks[tiles[0]]) & (base <= tile_positions[:, -1])
            live = meets.nonzero().squeeze(1)
            distance = tile_positions[live] - base[live, None]
            of = tiles[0][live]
            blocks = metadata.block_tables[of, page].long()
            self._pages.append((live, blocks, distance, profiles[of]))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend = self._backend
        heads, dim = backend.config.num_heads, backend.config.head_dim
        query, key, value = qkv.view(-1, 3, heads, dim).unbind(1)
        cos, sin = self._turns(backend.profiles.keys, layer, self._profile, self._offset)
        keys, values = backend.cache.keys[layer], backend.cache.values[layer]
        keys[self._block, :, :, self._offset] = rotate(key, cos[:, None], sin[:, None])
        values[self._block, :, self._offset] = value

        shape = (self._num_tiles, heads, backend.TILE_ROWS)
        queries = query.new_zeros((*shape, dim), dtype=torch.float32)
        queries[self._tile, :, self._place] = query.float() * backend.scale
        out = torch.zeros_like(queries)
        total = queries.new_zeros((*shape, 1))
        best = queries.new_full((*shape, 1), -1e30)  # finite: absent rows see nothing at all
        for live, blocks, distance, profile in self._pages:
            turns = self._turns(backend.profiles.queries, layer, profile, distance)
            scores = _scores(queries[live], keys[blocks], distance, *turns)
            highest = torch.maximum(best[live], scores.amax(-1, keepdim=True))
            decay = power_of_two(best[live] - highest)
            weights = power_of_two(scores - highest)
            out[live] = out[live] * decay + _product(weights, values[blocks].float())
            total[live] = total[live] * decay + _sum_last(weights)
            best[live] = highest
        rows = (out / total)[self._tile, :, self._place]
        return rows.to(qkv.dtype).reshape(-1, heads * dim)

    def _turns(
        self, tables: Callable[[int, int], RotaryTable], layer: int, profile: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 [..., rotary_dim / 2], at places `at`, int64 [n, ...], of the
        tables of profiles int64 [n]."""
        half = self._backend.config.rotary_dim // 2
        cos = torch.empty((*at.shape, half), device=at.device)
        sin = torch.empty_like(cos)
        for each in self._in_force:
            table = tables(each, layer)
            place = at.clamp(0, len(table.cos) - 1)  # only absent or masked rows are clamped
            if len(self._in_force) == 1:
                return table.cos[place], table.sin[place]
            mine = profile == each
            cos[mine], sin[mine] = table.cos[place[mine]], table.sin[place[mine]]
        return cos, sin


def _scores(queries: Tensor, keys: Tensor, distance: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Masked scores, float32 [tiles, num_heads, TILE_ROWS, block_size].

    queries float32 [tiles, num_heads, TILE_ROWS, head_dim]; keys [tiles, num_heads, head_dim,
    block_size]; distance int64 [tiles, TILE_ROWS], from the base of the tile's page to the row; cos
    and sin [tiles, TILE_ROWS, rotary_dim / 2], the turns of that distance.
    """
    turned = rotate(queries, cos[:, None], sin[:, None])
    slots = torch.arange(keys.shape[-1], device=keys.device)
    hidden = slots > distance[:, None, :, None]
    return _product(turned, keys.float()).masked_fill(hidden, float("-inf"))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product [n, heads, i, j] x [n, heads, j, k]; each of fixed shape."""
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    if len(flat_a) == 1:  # a batch of one takes another way through the library: make it two
        flat = torch.bmm(flat_a.expand(2, -1, -1), flat_b.expand(2, -1, -1))[:1]
    else:
        flat = torch.bmm(flat_a, flat_b)
    return flat.view(*a.shape[:-1], b.shape[-1])


def _sum_last(x: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two), by halves, keeping it."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


def power_of_two(x: Tensor) -> Tensor:
    """2^x for x <= 0, float32, to 2 ulp; exactly 1 at 0, exactly 0 below -125."""
    bounded = x.clamp(min=-126.0)
    whole = bounded.round()
    f = bounded - whole
    p = torch.full_like(f, POWER_COEFFICIENTS[0])
    for coefficient in POWER_COEFFICIENTS[1:]:
        p = p * f + coefficient
    exponent = (whole.to(torch.int32) + 127) << 23
    return torch.where(x >= -125.0, p * exponent.view(torch.float32), 0.0)
