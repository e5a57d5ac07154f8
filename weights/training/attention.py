"""Causal attention for training on a CPU, where windows are short."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.attention.causal import CausalAttention
from engine.model.rope import rotate


class ShortWindowAttention(CausalAttention):
    """CausalAttention by plain products, up to `longest` tokens on a CPU; else as it is.

    PyTorch's fused CPU attention, forward and backward, takes 2.5 times as long as three plain
    steps at 256 tokens, and is the faster one at 1,024, where scores no longer fit the cache.
    """

    longest = 512

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[batch, time, 3 * hidden_size] -> [batch, time, hidden_size]"""
        batch, time, width = qkv.shape
        if time > self.longest or qkv.device.type != "cpu":
            return super().__call__(layer, qkv)
        head_dim = width // (3 * self.num_heads)
        heads = qkv.view(batch, time, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        cos, sin = self.table.cos[:time], self.table.sin[:time]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        hidden_future = qkv.new_full((time, time), -torch.inf).triu(1)
        scores = torch.baddbmm(
            hidden_future.expand(batch * self.num_heads, time, time),
            query.flatten(0, 1),
            key.flatten(0, 1).transpose(1, 2),
            alpha=head_dim**-0.5,
        )
        attended: Tensor = scores.softmax(dim=-1) @ value.flatten(0, 1)
        by_token = attended.view(batch, self.num_heads, time, head_dim).transpose(1, 2)
        return by_token.reshape(batch, time, self.num_heads * head_dim)
