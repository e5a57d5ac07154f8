"""Stored frequencies: what `rotary-embedding-torch` and rotary buffers leave in a state dict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.loader import FLOAT_TYPES
from engine.model.rope import inverse_frequencies
from weights.source import StoredTensor


def from_frequencies(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Settings that stored frequencies imply; nothing where there are none.

    tensors: names ending in `freqs` (rotary-embedding-torch's parameter, whose pairs are
    interleaved) or `inv_freq` (a buffer, which says nothing of pairs), none of them learned. Raises
    CheckpointError where they follow no base, or differ between layers.
    """
    settings: dict[str, Any] = {}
    for name, tensor in tensors.items():
        _check(tensor)
        said: dict[str, Any] = {"rotary_dim": 2 * tensor.shape[0]}
        base = base_of(tensor)
        if base is not None:
            said["rope_base"] = base
        if name.endswith("freqs"):
            said |= {"pairing": "interleaved", "rope_sign": 1}
        for key, value in said.items():
            if settings.setdefault(key, value) != value:
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} says {key} {value}, another {settings[key]}: "
                    "frequencies that differ by layer are not served"
                )
    return settings


def learned(tensors: Mapping[str, StoredTensor], num_layers: int) -> list[StoredTensor]:
    """rotary-embedding-torch's parameters that follow no base: learned ones, or others by choice.

    One where all layers share it, else one for each in their order; none where all `freqs` follow
    one base. Raises CheckpointError where they are neither.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.endswith("freqs")}
    for tensor in own.values():
        _check(tensor)
    values = {name: tensor.read() for name, tensor in own.items()}
    same = all(torch.equal(each, next(iter(values.values()))) for each in values.values())
    if not own or (same and follows_base(next(iter(own.values())))):
        return []
    if same:
        return [next(iter(own.values()))]
    layers = {int(match[1]): own[name] for name in own if (match := re.search(r"\.(\d+)\.", name))}
    lengths = {tensor.shape for tensor in layers.values()}
    if len(own) != num_layers or sorted(layers) != list(range(num_layers)) or len(lengths) > 1:
        tensor = next(iter(own.values()))
        raise CheckpointError(
            f"{tensor.file}: the frequencies {', '.join(own)} differ, and are not one list of "
            f"equal length for each of {num_layers} layers"
        )
    return [layers[layer] for layer in range(num_layers)]


def _check(tensor: StoredTensor) -> None:
    if tensor.dtype not in FLOAT_TYPES.values() or len(tensor.shape) != 1 or not tensor.shape[0]:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is no list of frequencies")


def follows_base(tensor: StoredTensor) -> bool:
    """Whether frequencies are those of some base."""
    try:
        base_of(tensor)
    except CheckpointError:
        return False
    return True


def base_of(tensor: StoredTensor) -> float | None:
    """The base that frequencies base^(-2i / dim) have; None for a single one, which has any."""
    values: Tensor = tensor.read().double()
    dim = 2 * len(values)
    tolerance = max(1e-5, 4 * torch.finfo(tensor.dtype).eps)
    if dim == 2 and abs(values[0].item() - 1) < tolerance:
        return None
    last = values[-1].item()
    exact = last ** (-dim / (dim - 2)) if dim > 2 and last > 0 else 0.0
    for base in (float(round(exact)), exact):
        if base > 1 and torch.allclose(
            values, inverse_frequencies(dim, base), rtol=tolerance, atol=0
        ):
            return base
    raise CheckpointError(
        f"{tensor.file}: the frequencies {tensor.name} follow no base: scaled ones are not "
        "converted"
    )
