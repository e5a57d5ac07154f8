"""Attention as written on paper: the oracles for the fast backends. Slow on purpose."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.rope import RotaryTable, rotate


class ReferenceBackend(AttentionBackend):
    """The contract of the paged cache, a row and a page at a time, in float64.

    Keys are stored rotated by their offset; the query of a row at position t is rotated by t - b
    for a page with base b. Only the two rotations are float32, as in every backend, so that the
    cached bytes can be compared to the bit.
    """

    name = "reference"

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward."""
        heads, dim = self.config.num_heads, self.config.head_dim
        query, key, value = qkv.view(-1, 3, heads, dim).unbind(1)
        profiles = metadata.profiles.tolist()

        out = torch.empty_like(query)
        starts = metadata.query_start.tolist()
        positions = metadata.positions.tolist()
        for seq, (start, end) in enumerate(pairwise(starts)):
            table = self.profiles.keys(profiles[seq], layer)
            rows = slice(start, end)
            slots = metadata.slot_mapping[rows].tolist()
            self._store(layer, key[rows], value[rows], slots, table)
        for seq, (start, end) in enumerate(pairwise(starts)):
            table = self.profiles.queries(profiles[seq], layer)
            count = int(metadata.num_blocks[seq])
            blocks = metadata.block_tables[seq, :count].tolist()
            bases = metadata.bases[seq, :count].tolist()
            for row in range(start, end):
                out[row] = self._attend(layer, query[row], positions[row], blocks, bases, table)
        return out.reshape(-1, heads * dim)

    def _store(
        self, layer: int, key: Tensor, value: Tensor, slots: list[int], table: RotaryTable
    ) -> None:
        """Write key and value [num_rows, num_heads, head_dim] to their slots."""
        for row, slot in enumerate(slots):
            block, offset = divmod(slot, self.cache.block_size)
            cos, sin = table.cos[offset], table.sin[offset]
            self.cache.keys[layer][block, :, :, offset] = rotate(key[row], cos, sin)
            self.cache.values[layer][block, :, offset, :] = value[row]

    def _attend(
        self,
        layer: int,
        query: Tensor,
        position: int,
        blocks: list[int],
        bases: list[int],
        table: RotaryTable,
    ) -> Tensor:
        """Output [num_heads, head_dim], float64, of one query [num_heads, head_dim]."""
        scores, values = [], []
        for block, base in zip(blocks, bases, strict=True):
            visible = min(position - base + 1, self.cache.block_size)
            if visible <= 0:
                continue
            distance = position - base
            turned = rotate(query.float(), table.cos[distance], table.sin[distance])
            keys = self.cache.keys[layer][block, :, :, :visible].double()
            scores.append(torch.einsum("hd,hds->hs", turned.double(), keys))
            values.append(self.cache.values[layer][block, :, :visible].double())
        weights = torch.softmax(torch.cat(scores, dim=1) / self.config.head_dim**0.5, dim=1)
        return torch.einsum("hs,hsd->hd", weights, torch.cat(values, dim=1))


class NaiveAttention:
    """Full recompute of one sequence: no cache, no pages, every position rotated absolutely."""

    def __init__(
        self, table: RotaryTable, num_heads: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """dtype: what scores and sums are computed in, float32 or float64."""
        self.table = table
        self.num_heads = num_heads
        self.dtype = dtype

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """Positions 0 .. time - 1, [time, 3 * hidden_size] -> [time, hidden_size]."""
        time, width = qkv.shape
        heads = qkv.view(time, 3, self.num_heads, width // (3 * self.num_heads))
        query, key, value = heads.permute(1, 2, 0, 3)
        cos, sin = self.table.cos[:time], self.table.sin[:time]
        query = rotate(query.float(), cos, sin).to(self.dtype)
        key = rotate(key.float(), cos, sin).to(self.dtype)
        scores = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        future = torch.ones(time, time, dtype=torch.bool, device=qkv.device).triu(1)
        weights = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
        out: Tensor = weights @ value.to(self.dtype)
        return out.transpose(0, 1).reshape(time, width // 3).to(qkv.dtype)
