"""Rotation frequencies and their tables; apart from pairing and from storage.

RoPE (Su et al. 2021, arXiv 2104.09864) rotates the i-th pair of a query or key at position p by
the angle p * inv_freq_i. Rotations compose, R(a) R(b) = R(a + b), and a score depends on the
distance only: (R(t) q)^T (R(p) k) = q^T R(p - t) k. The paged cache rests on that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig


def inverse_frequencies(rotary_dim: int, base: float) -> Tensor:
    """inv_freq_i = base^(-2i / rotary_dim), float64 [rotary_dim / 2], radians per token."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return base**-exponents


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of every integer distance; float32 [num_positions, rotary_dim / 2].

    An angle is (integer distance) x (float64 frequency), rounded to float32 once, after the cosine:
    float32 angles would drift by 5e-3 at a distance of a million.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def build(cls, inv_freq: Tensor, num_positions: int, first: int = 0) -> RotaryTable:
        """Table for num_positions distances from `first`; inv_freq float64 [rotary_dim / 2]."""
        distances = torch.arange(first, first + num_positions, dtype=torch.float64)
        angles = torch.outer(distances, inv_freq)
        return cls(cos=angles.cos().float().contiguous(), sin=angles.sin().float().contiguous())

    @classmethod
    def for_model(cls, config: ModelConfig, num_positions: int | None = None) -> RotaryTable:
        """The table of a model, over its context unless num_positions says otherwise."""
        inv_freq = inverse_frequencies(config.rotary_dim, config.rope_base)
        return cls.build(inv_freq, num_positions or config.max_position)

    def to(self, device: torch.device | str) -> RotaryTable:
        """The same table on another device."""
        return RotaryTable(cos=self.cos.to(device), sin=self.sin.to(device))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] dimensions of x, paired as (i, i + rotary_dim / 2).

    x [..., head_dim]; cos and sin float32, broadcastable to [..., rotary_dim / 2]. The rotation is
    computed in float32 and returned in x's dtype.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)
