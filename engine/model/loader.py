"""A model directory into a GPT2: strict keys and shapes, checked before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.files import read_json, shards_in
from engine.model.gpt2 import GPT2

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
"""Types of weights, as safetensors names them."""


def read_config(directory: Path) -> ModelConfig:
    """config.json of a model directory. Raises CheckpointError, naming the key."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        return ModelConfig.from_dict(read_json(directory / CONFIG_FILE))
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names."""
    index = directory / INDEX_FILE
    return shards_in(index) if index.is_file() else [directory / WEIGHTS_FILE]


def _check_headers(directory: Path, expected: dict[str, torch.Size]) -> dict[str, Path]:
    """The file of each tensor. Names, shapes and types are checked by the headers alone."""
    found: dict[str, Path] = {}
    for path in _weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    _check_header(path, name, file.get_slice(name), expected, found)
                    found[name] = path
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    if missing := sorted(expected.keys() - found.keys()):
        raise CheckpointError(
            f"{directory}: {len(missing)} tensors are missing, first {missing[0]}"
        )
    return found


def _read_tensor(path: Path, name: str) -> Tensor:
    """A tensor as stored. It holds the whole file mapped for as long as it lives."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    # A NaN is the least and the largest; fifty times faster than isfinite() of everything.
    if not torch.stack(tensor.aminmax()).isfinite().all():
        raise CheckpointError(f"{path.parent}: tensor {name} holds NaN or infinite values")
    return tensor


def _check_header(
    path: Path,
    name: str,
    header: Any,  # safetensors' slice; the library has no type for it
    expected: dict[str, torch.Size],
    found: Collection[str],
) -> None:
    shape, dtype = list(header.get_shape()), header.get_dtype()
    if name not in expected:
        raise CheckpointError(f"{path}: unknown tensor {name}")
    if name in found:
        raise CheckpointError(f"{path}: tensor {name} is in another shard too")
    if shape != list(expected[name]):
        raise CheckpointError(
            f"{path}: tensor {name} has shape {shape}; config.json says {list(expected[name])}"
        )
    if dtype not in FLOAT_TYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has type {dtype}; one of {', '.join(FLOAT_TYPES)} is needed"
        )


def stored_dtypes(directory: Path) -> set[torch.dtype]:
    """The types of a model directory's tensors. Only the headers are read."""
    found = set()
    for path in _weight_files(directory):
        with safe_open(path, framework="pt") as file:
            found |= {FLOAT_TYPES[file.get_slice(name).get_dtype()] for name in list(file.keys())}
    return found


def canonical_order(config: ModelConfig) -> Tensor:
    """Where the engine's dimensions of a head stand in a stored one, int64 [head_dim].

    The engine rotates (i, i + rotary_dim / 2) by plus the angle. Interleaved pairs (2i, 2i + 1) are
    put so; a pair rotated by minus the angle is the same pair, exchanged, rotated by plus it.
    """
    order = torch.arange(config.head_dim)
    rotated = order[: config.rotary_dim]
    pairs = (rotated[0::2], rotated[1::2]) if config.pairing == "interleaved" else rotated.chunk(2)
    order[: config.rotary_dim] = torch.cat(pairs if config.rope_sign == 1 else pairs[::-1])
    return order


def canonical(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """A stored tensor with queries and keys as the engine rotates them; scores stay the same.

    config: what was stored. qkv is [3 * hidden_size, ...], rows as (q, k, v) x heads x head_dim.
    """
    if (config.pairing, config.rope_sign) == ("half", 1):
        return tensor
    order = canonical_order(config)
    if ".qk_norm." in name:
        return tensor[order]
    if ".qkv." not in name:
        return tensor
    heads = tensor.view(3, config.num_heads, config.head_dim, *tensor.shape[1:]).clone()
    heads[:2] = heads[:2][:, :, order]
    return heads.reshape(tensor.shape)


def _served(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is kept in: all in dtype, but an angle grows with the position."""
    return torch.float64 if name == "inv_freq" else dtype


class _Unset(TorchFunctionMode):
    """Leaves new parameters as they are.

    The file will set them; and torch imports its whole compiler to draw normal numbers on the meta
    device: a second, and 100 MB.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


def load_model(directory: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> GPT2:
    """The model of a directory, in dtype, on device, ready to run. Raises CheckpointError."""
    stored = read_config(directory)
    config = replace(stored, pairing="half", rope_sign=1)
    with torch.device("meta"), _Unset():
        model = GPT2(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if config.tie_embeddings:
        del expected["head.weight"]
    tensors = {  # one by one, and copied: so the file does not stay in memory beside them
        name: canonical(name, _read_tensor(path, name), stored).to(
            device, _served(name, dtype), copy=True
        )
        for name, path in _check_headers(directory, expected).items()
    }
    model.load_state_dict(tensors, strict=not config.tie_embeddings, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)
