"""A loaded model made ready to serve on a CPU: few and large calls in place of many small ones.

gpt2.py says what is computed; here is the same in another cut. Norms, biases, activations and
residuals are part of the products, the residual stream is float32, and so are the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Quantize
from engine.errors import ConfigError
from engine.model.attention.base import Attention
from engine.model.attention.cpu import KernelStep
from engine.model.cpu_linear import KernelLinear, PanelEmbedding, WeightMemory
from engine.model.cpu_stack import KernelStack
from engine.model.gpt2 import GPT2, Block
from engine.model.library import KernelUnavailableError, load_kernel
from engine.model.linear import pack


class WideEmbedding(nn.Module):
    """Rows of an embedding in float32, whatever its own type."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids [...] -> float32 [..., hidden_size]."""
        return F.embedding(token_ids, self.weight).float()


class FusedBlock(nn.Module):
    """Block's computation in five calls: four products, and attention between them."""

    def __init__(self, block: Block, product: partial[KernelLinear]) -> None:
        super().__init__()
        self.layer = block.layer
        self.parallel = block.parallel
        wide = torch.float32
        up, down = block.mlp.up, block.mlp.down
        self.qkv = product(block.qkv, norm=block.norm1, in_dtype=wide)
        self.qk_norm = block.qk_norm
        self.out = product(block.out, out_dtype=wide)
        kind = block.mlp.activation.kind
        self.up = product(up, norm=block.norm2, activation=kind, in_dtype=wide)
        self.down = product(down, out_dtype=wide)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """float32 [..., hidden_size] -> the same"""
        attended = self.out(attention(self.layer, self.qk_norm(self.qkv(x))), residual=x)
        done: Tensor = self.down(self.up(x if self.parallel else attended), residual=attended)
        return done


class FusedStack(nn.Module):
    """All blocks: one call where attention is the kernel's too, else block after block."""

    def __init__(self, blocks: Sequence[FusedBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self._stack = None
        if all(isinstance(block.qk_norm, nn.Identity) for block in blocks):
            products = [(block.qkv, block.out, block.up, block.down) for block in blocks]
            self._stack = KernelStack(products, blocks[0].parallel)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """float32 [num_rows, hidden_size] -> the same"""
        if self._stack is not None and isinstance(attention, KernelStep):
            return self._stack(x, attention)
        for block in self.blocks:
            x = block(x, attention)
        return x


def fuse(model: GPT2, quantize: Quantize = "none", kept_logits: int = 0) -> str:
    """Replace the layers of a loaded model, in place; it can no longer be trained.

    The last norm becomes part of the head, which so returns float32 logits of the rows that it is
    given; up to kept_logits rows of them last until its next call. Returns the variant of the
    kernel in use. Raises KernelUnavailableError, before anything is changed.
    """
    chosen, _ = load_kernel("linear", [])
    memory = WeightMemory()
    weight_format = None if quantize == "none" else quantize
    product = partial(KernelLinear, memory=memory, weight_format=weight_format)
    wide = torch.float32
    head = product(
        model.head, norm=model.norm, in_dtype=wide, out_dtype=wide, kept_rows=kept_logits
    )
    model.add_module("head", head)
    model.add_module("norm", nn.Identity())
    tied = model.config.tie_embeddings and quantize == "none"
    model.add_module(
        "embedding",
        PanelEmbedding(head) if tied else WideEmbedding(model.embedding.weight.detach()),
    )
    fused = []
    for layer, block in enumerate(model.blocks):  # one by one: each frees the weights it replaces
        fused.append(FusedBlock(cast(Block, block), product))
        model.blocks[layer] = nn.Identity()
    model.blocks = nn.ModuleList([FusedStack(fused)])
    return chosen


def prepare(model: GPT2, quantize: Quantize = "none", kept_logits: int = 0) -> str:
    """Make a loaded model ready to serve on this machine's CPU, by the fastest products it has.

    kept_logits: rows of logits that may last until the next call only. They are large: taken anew
    in every step, beside what is small and stays, they leave gaps and the heap grows.

    Returns a line for people: "cpu-avx512bf16, int8", or "torch (why not the kernel)". Raises
    ConfigError where quantized weights are asked for and there is no kernel for them.
    """
    try:
        variant = fuse(model, quantize, kept_logits)
    except KernelUnavailableError as error:
        if quantize != "none":
            raise ConfigError(
                f"quantize {quantize} needs the compiled kernel, and {error}"
            ) from error
        pack(model)
        return f"torch ({error})"
    return f"cpu-{variant}" if quantize == "none" else f"cpu-{variant}, {quantize}"
