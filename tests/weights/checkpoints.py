"""Checkpoints as their trainers would have written them, from a model of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config import ModelConfig
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model, read_config
from engine.model.rope import RotaryTable
from tests.models import tiny_config, write_model
from weights.formats.table import Format

FORK = {
    "pairing": "half",
    "rope_sign": 1,
    "rope_base": 10_000,
    "rotary_dim": 16,
    "qkv_layout": "stacked",
}
"""What a fork of nanoGPT leaves open, as make() has it."""

TOKENS = torch.tensor([5, 6, 7, 200, 201, 3, 5, 5, 9, 100, 17, 5])


def logits(directory: Path) -> Tensor:
    model = load_model(directory, torch.float32)
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    return model.logits(model(TOKENS, attention))


def make(directory: Path, **changes: object) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A model directory of ours, its settings and its tensors, with the head."""
    directory.mkdir(parents=True, exist_ok=True)
    write_model(directory, tiny_config(**changes))
    return read_config(directory), load_file(directory / "model.safetensors")


def rename(tensors: Mapping[str, Tensor], table: Format, config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors by a format's names: split, transposed and ordered as it has them."""
    renamed: dict[str, Tensor] = {}
    for name, ours in tensors.items():
        tensor = ours
        module, _, kind = name.rpartition(".")
        layer = ""
        if module.startswith("blocks."):
            _, layer, module = module.split(".", 2)
        theirs = table.modules[module]
        if module == "qkv" and table.layout == "per_head":
            heads = tensor.view(3, config.num_heads, config.head_dim, *tensor.shape[1:])
            tensor = heads.transpose(0, 1).reshape(tensor.shape)
        names = (theirs,) if isinstance(theirs, str) else theirs
        for part, each in zip(tensor.chunk(len(names)), names, strict=True):
            turned = part.t() if module in table.transposed and kind == "weight" else part
            renamed[f"{each.format(layer)}.{kind}"] = turned.contiguous()
    return renamed


def nanogpt_args(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    args = {
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.hidden_size,
        "block_size": config.max_position,
        "bias": config.bias,
        "vocab_size": config.padded_vocab_size,
        "dropout": 0.0,
    }
    return args | changes


def interleave(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same model, its rotated pairs side by side."""
    half = config.rotary_dim // 2
    order = torch.arange(config.head_dim)
    order[: 2 * half : 2], order[1 : 2 * half : 2] = torch.arange(half), torch.arange(half) + half
    return _reorder(tensors, config, order)


def turn_back(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same model, rotated by minus the angle."""
    half = config.rotary_dim // 2
    order = torch.arange(config.head_dim)
    order[: 2 * half] = torch.cat((torch.arange(half) + half, torch.arange(half)))
    return _reorder(tensors, config, order)


def _reorder(
    tensors: Mapping[str, Tensor], config: ModelConfig, order: Tensor
) -> dict[str, Tensor]:
    reordered = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            shape = (3, config.num_heads, config.head_dim, *tensor.shape[1:])
            heads = tensor.view(shape).clone()
            heads[:2] = heads[:2][:, :, order]
            reordered[name] = heads.reshape(tensor.shape)
    return reordered
