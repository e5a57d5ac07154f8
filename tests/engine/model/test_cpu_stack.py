"""All blocks in one call: the bits of block after block, and what it refuses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from engine.config import Quantize
from engine.model.attention.base import AttentionMetadata
from engine.model.attention.cpu import CPUBackend, KernelStep
from engine.model.gpt2 import GPT2
from engine.model.serving import FusedStack, fuse
from tests.engine.model.attention.steps import Sequences
from tests.models import random_model, tiny_config

CHUNKS = [[(0, 0, 70), (1, 0, 1)], [(0, 70, 71), (1, 1, 9)], [(0, 71, 72), (1, 9, 10)]]


class Hidden(nn.Module):
    """A step's attention as any other callable: the stack then goes block by block."""

    def __init__(self, attention: KernelStep) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, layer: int, qkv: Tensor) -> Tensor:
        return self.attention(layer, qkv)


def served(
    parallel: bool = False, dtype: torch.dtype = torch.float32, quantize: Quantize = "none"
) -> tuple[GPT2, Sequences]:
    model = random_model(tiny_config(parallel_residual=parallel, num_layers=3)).to(dtype)
    fuse(model, quantize)
    return model, Sequences.random(model.config, [100, 20], 32, dtype)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "int8")],
)
def test_one_call_gives_the_bits_of_many(
    parallel: bool, dtype: torch.dtype, quantize: Quantize
) -> None:
    model, places = served(parallel, dtype, quantize)
    one, many = places.build(CPUBackend), places.build(CPUBackend)
    with torch.inference_mode():
        for chunks in CHUNKS:
            metadata = places.metadata(chunks)
            token_ids = torch.arange(len(metadata.positions)) * 7 % 200
            expected = model(token_ids, Hidden(_bind(many, metadata)))
            actual = model(token_ids, one.bind(metadata))
            assert torch.equal(actual, expected)
    for cached, wanted in zip(one.cache.keys, many.cache.keys, strict=True):
        assert torch.equal(cached, wanted)


def _bind(backend: object, metadata: AttentionMetadata) -> KernelStep:
    assert isinstance(backend, CPUBackend)
    step = backend.bind(metadata)
    assert isinstance(step, KernelStep)
    return step


def test_what_is_between_products_and_attention_is_not_left_out() -> None:
    model = random_model(tiny_config(qk_norm="before", qk_norm_weight=True))
    stack = fused(model)
    called = []
    for block in stack.blocks:
        block.qk_norm.register_forward_hook(lambda *_: called.append(1))
    places = Sequences.random(model.config, [5], 32, torch.float32)
    model(torch.arange(5), places.build(CPUBackend).bind(places.metadata([(0, 0, 5)])))
    assert len(called) == model.config.num_layers


def fused(model: GPT2) -> FusedStack:
    fuse(model)
    stack = model.blocks[0]
    assert isinstance(stack, FusedStack)
    return stack


def test_it_refuses_another_cache_and_other_rows() -> None:
    model, places = served()
    stack = model.blocks[0]
    other = Sequences.random(model.config, [5], 32, torch.bfloat16)
    bound = partial(other.build(CPUBackend).bind, other.metadata([(0, 0, 5)]))
    with pytest.raises(ValueError, match=r"the cache holds torch.bfloat16, the products give"):
        stack(torch.zeros(5, model.config.hidden_size), bound())
    step = places.build(CPUBackend).bind(places.metadata([(0, 0, 5)]))
    with pytest.raises(ValueError, match=r"x must be contiguous float32 \(5, \d+\), got .*\(4,"):
        stack(torch.zeros(4, model.config.hidden_size), step)


def test_a_step_outside_the_cache_is_an_error() -> None:
    model, places = served()
    metadata = places.metadata([(0, 0, 5)])
    metadata.block_tables.fill_(10_000)
    with pytest.raises(ValueError, match="outside the cache"):
        model(torch.arange(5), places.build(CPUBackend).bind(metadata))
