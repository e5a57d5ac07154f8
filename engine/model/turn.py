"""Turns: rotations of pairs of features, a complex number for each pair.

A turn is magnitude * (cos, sin), kept as a real tensor [..., pairs, 2]. Features (2i, 2i + 1) are a
complex number too, and rotating them is one complex product: a single pass over memory, where real
arithmetic on interleaved pairs takes five.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype if that is wider."""
    return torch.promote_types(dtype, torch.float32)


def turns_of(angles: Tensor) -> Tensor:
    """Angles [..., pairs], radians -> turns [..., pairs, 2] of magnitude 1, at least float32."""
    angles = angles.to(at_least_float32(angles.dtype))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def along(turns: Tensor, seq_dim: int) -> Tensor:
    """[time, pairs, 2] made to broadcast with tensors that have time at dimension seq_dim < -1."""
    return turns[(slice(None), *[None] * (-2 - seq_dim))]


def rotate_pairs(
    t: Tensor, turns: Tensor, start_index: int = 0, scale: float | Tensor = 1.0
) -> Tensor:
    """Multiply the interleaved pairs of t [..., dim], from start_index on, by turns, then by scale.

    turns [..., pairs, 2] broadcast with t's pairs; scale with its rotated features. Computed in the
    wider of both dtypes, returned in t's. ValueError: t has too few features.
    """
    width = 2 * turns.shape[-2]
    end = start_index + width
    if end > t.shape[-1]:
        raise ValueError(f"cannot rotate features up to {end}: t has only {t.shape[-1]}")
    dtype = torch.promote_types(t.dtype, turns.dtype)
    middle = t[..., start_index:end].to(dtype)
    pairs = middle.reshape(*middle.shape[:-1], width // 2, 2)
    turned = _product(pairs, turns.to(dtype)).flatten(-2)
    if isinstance(scale, Tensor) or scale != 1:
        turned = turned * scale
    turned = turned.to(t.dtype)
    if width == t.shape[-1]:
        return turned
    return torch.cat((t[..., :start_index], turned, t[..., end:]), dim=-1)


def _product(pairs: Tensor, turns: Tensor) -> Tensor:
    """The complex product of [..., 2] and [..., 2]."""
    if torch.compiler.is_compiling():  # the compiler fuses real products, but not complex ones
        (a, b), (cos, sin) = pairs.unbind(-1), turns.unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.view_as_real(_complex(pairs) * _complex(turns))


def _complex(pairs: Tensor) -> Tensor:
    """The same memory as complex numbers; a copy where its layout does not allow that."""
    steps = (pairs.storage_offset(), *pairs.stride()[:-1])
    if pairs.stride(-1) != 1 or any(step % 2 for step in steps):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)
