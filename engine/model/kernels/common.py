"""What several kernels share: rounding, and how the interpreter differs from a device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

MIN_DOT = 16
"""Least size of every side of a tile of tensor cores."""


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def padded(size: int) -> int:
    """The least power of two that holds `size` and that tensor cores take."""
    return max(MIN_DOT, next_power_of_2(size))


def emulates(dtype: torch.dtype) -> bool:
    """Whether bfloat16 is emulated: Triton's interpreter keeps it as integers, truncates towards it
    and cannot multiply it, so there it is rounded by hand and multiplied as float32."""
    return bool(knobs.runtime.interpret) and dtype == torch.bfloat16


@triton.jit
def rounded(x, dtype: tl.constexpr, emulated: tl.constexpr):
    """float32 -> dtype, to the nearest, ties to even."""
    if emulated and dtype != tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def operand(x, dtype: tl.constexpr, emulated: tl.constexpr):
    """A side of a product, float32 -> what tensor cores are fed with."""
    return loaded(rounded(x, dtype, emulated), emulated)


@triton.jit
def loaded(x, emulated: tl.constexpr):
    """A side of a product as it was read from memory."""
    if emulated:
        x = x.to(tl.float32)
    return x
