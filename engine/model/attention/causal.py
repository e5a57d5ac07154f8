"""Attention for training: whole sequences, absolute rotation, gradients."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from engine.model.rope import RotaryTable, rotate


class CausalAttention:
    """Causal self-attention over [batch, time], each position rotated absolutely."""

    def __init__(self, table: RotaryTable, num_heads: int) -> None:
        self.table = table
        self.num_heads = num_heads

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """[batch, time, 3 * hidden_size] -> [batch, time, hidden_size]"""
        batch, time, width = qkv.shape
        heads = qkv.view(batch, time, 3, self.num_heads, width // (3 * self.num_heads))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        cos, sin = self.table.cos[:time], self.table.sin[:time]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(batch, time, width // 3)
