"""Stored tensors into ours: put together, transposed, and the rows of qkv in our order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.config import ModelConfig
from weights.formats.description import FREQUENCIES, Description
from weights.formats.table import Layout

CODEGEN_SHARDS = 4
"""CodeGen's weights are laid out for this many processors, whatever they run on."""


def stack_rows(tensor: Tensor, layout: Layout, config: ModelConfig) -> Tensor:
    """The rows of qkv [3 * hidden_size, ...] in our order: all heads of q, then of k, then of v."""
    heads, dim, rest = config.num_heads, config.head_dim, tensor.shape[1:]
    if layout == "per_head":
        return tensor.view(heads, 3, dim, *rest).transpose(0, 1).reshape(tensor.shape)
    if layout == "codegen":
        shards = tensor.view(CODEGEN_SHARDS, 3, config.hidden_size // CODEGEN_SHARDS, *rest)
        return shards[:, [0, 2, 1]].transpose(0, 1).reshape(tensor.shape)
    return tensor


def by_head(tensor: Tensor, config: ModelConfig) -> Tensor:
    """The reverse of `per_head`: our rows of qkv as GPT-NeoX stores them."""
    shape = (3, config.num_heads, config.head_dim, *tensor.shape[1:])
    return tensor.view(shape).transpose(0, 1).reshape(tensor.shape)


def assemble(description: Description, name: str, layout: Layout, config: ModelConfig) -> Tensor:
    """One of our tensors, in the type in which it is stored. Raises CheckpointError for NaN."""
    module = name.rpartition(".")[0].removeprefix("blocks.").lstrip("0123456789.")
    tensors = [part.read() for part in description.parts[name]]
    if module in description.format.transposed:
        tensors = [tensor.t() if tensor.dim() == 2 else tensor for tensor in tensors]
    if name == FREQUENCIES and len(tensors) > 1:
        return torch.stack(tensors)
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return stack_rows(whole, layout, config) if module == "qkv" else whole


def all_tensors(
    description: Description, layout: Layout, config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """All of our tensors by name, one after the other; a tied head is left out."""
    for name in description.parts:
        if not (config.tie_embeddings and name == "head.weight"):
            yield name, assemble(description, name, layout, config).contiguous()
