"""How much is checked on a GPU, and when two tensors are close enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of the largest number expected; the products' operands are rounded to the type."""

HEADS = ((64, 64), (64, 32), (32, 32), (80, 20), (96, 48), (128, 128), (256, 64))
"""head_dim, rotary_dim"""


@dataclass(frozen=True)
class Scale:
    """How much is checked: all on a GPU, a little under the interpreter."""

    device: str
    dtypes: Sequence[torch.dtype] = DTYPES
    heads: Sequence[tuple[int, int]] = HEADS
    block_sizes: Sequence[int] = (16, 32, 64)
    num_heads: int = 3
    lengths: Sequence[int] = (1, 70, 130, 17)
    products: Sequence[tuple[int, int]] = ((768, 2304), (768, 768), (3072, 768), (768, 50304))
    num_rows: Sequence[int] = (1, 2, 3, 16, 17, 33, 64, 100, 257, 512)
    draws: int = 20_000
    sampled_vocab: int = 50_257
    prompt: int = 70
    output: int = 24
    budgets: Sequence[int] = (512, 7)
    layers: int = 4
    width: int = 64
    vocab: int = 200


SMALL = Scale(
    device="cpu",
    dtypes=(torch.bfloat16,),
    heads=((32, 16),),
    block_sizes=(16,),
    num_heads=1,
    lengths=(1, 17),
    products=((48, 24),),
    num_rows=(1, 17),
    draws=3,
    sampled_vocab=60,
    prompt=15,
    output=3,
    budgets=(20,),
    layers=1,
    width=32,
    vocab=40,
)
"""For the interpreter, which takes a millisecond for a handful of operations."""


def close(actual: Tensor, expected: Tensor) -> str:
    """How far apart; AssertionError where that is too far."""
    largest = max(1.0, float(expected.abs().max()))
    error = float((actual.cpu().double() - expected.cpu().double()).abs().max()) / largest
    limit = TOLERANCE[actual.dtype]
    assert error <= limit, f"error {error:.2e} of the largest, above {limit:.2e}"
    return f"error {error:.1e}"


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """AssertionError, with how many rows differ, unless two tensors are equal to the bit."""
    if not torch.equal(actual, expected):
        rows = int((actual != expected).flatten(1).any(1).sum())
        raise AssertionError(f"{what}: {rows} of {len(actual)} rows differ")


def small_config(scale: Scale) -> ModelConfig:
    """A network small enough for a full recompute."""
    return ModelConfig(
        vocab_size=scale.vocab,
        padded_vocab_size=scale.vocab + 8,
        num_layers=scale.layers,
        num_heads=scale.width // 32,
        hidden_size=scale.width,
        intermediate_size=3 * scale.width // 2,
        max_position=512,
        rotary_dim=16,
    )
