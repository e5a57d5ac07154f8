"""A checkpoint as it lies on the disk: its tensors by name, unread, and what its files say of it.

Nothing is believed before it is checked: a header is compared with the size of its file, a pickle
may hold tensors and plain values only, and a tensor's memory is taken when it is asked for.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from engine.files import read_json
from engine.model.loader import FLOAT_TYPES
from weights.files import read_header, settings_file, shards_of, weights_file

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every name."""

LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""What torch.save() wrote first before 1.6: a pickle of its magic number."""

STATES = ("model", "state_dict", "model_state_dict")
SETTINGS = ("model_args", "config", "model_config")
"""Keys of a .pt file under which trainers keep the weights, and the shape of the model."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read. name: in its file, without prefixes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """Its values. Raises CheckpointError where they are not finite."""
        tensor = self.load()
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{self.file}: tensor {self.name} holds NaN or infinite values")
        return tensor


@dataclass(frozen=True)
class Source:
    """A checkpoint: its tensors; settings, with the file that says them; the trainer's code."""

    path: Path
    tensors: dict[str, StoredTensor]
    settings: dict[str, Any] = field(default_factory=dict)
    settings_file: str = ""
    code: str = ""

    @property
    def directory(self) -> Path:
        """Where other files of the checkpoint would be."""
        return self.path if self.path.is_dir() else self.path.parent


def open_source(path: Path) -> Source:
    """A file (.pt, .pth, .bin, .safetensors) or a directory. Raises CheckpointError."""
    file = weights_file(path)
    settings, said_in = _read_settings(file)
    shards = shards_of(file)
    found: dict[str, StoredTensor] = {}
    code = ""
    for shard in shards:
        if shard.suffix == ".safetensors":
            tensors = read_safetensors(shard)
        else:
            tensors, inside, code = read_pickle(shard)
            if inside:
                settings, said_in = inside, shard.name
        for name, tensor in tensors.items():
            if name in found:
                raise CheckpointError(
                    f"{shard}: tensor {name} is in {found[name].file.name} under the same name"
                )
            found[name] = tensor
    if not found:
        raise CheckpointError(f"{file}: no tensors in it")
    return Source(path, found, settings, said_in, code)


def _read_settings(weights: Path) -> tuple[dict[str, Any], str]:
    """What the settings file beside the weights says, and its name."""
    path = settings_file(weights)
    if path is None:
        return {}, ""
    if path.suffix == ".json":
        return read_json(path), path.name
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content, path.name


def _plain(name: str) -> str:
    """Without what wrappers put before it."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by its header alone; each must fill the bytes that it claims."""
    header, room = read_header(path)
    found = {}
    for stored, entry in header.items():
        shape, dtype = _check_entry(path, stored, entry, room)
        name = _plain(stored)
        if name in found:
            raise CheckpointError(f"{path}: tensor {name} is there twice, as {stored} too")
        found[name] = StoredTensor(name, shape, dtype, path, partial(_load, path, stored))
    return found


def _check_entry(
    path: Path, name: str, entry: Any, available: int
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of a header's entry. available: bytes of data in the file."""
    try:
        shape = tuple(int(each) for each in entry["shape"])
        kind, (begin, end) = str(entry["dtype"]), (int(each) for each in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has a broken header: {error!r}") from error
    if kind not in FLOAT_TYPES and kind not in ("BOOL", "U8", "I8", "I16", "I32", "I64"):
        raise CheckpointError(
            f"{path}: tensor {name} has type {kind}; one of {', '.join(FLOAT_TYPES)} is needed"
        )
    if min(shape, default=0) < 0 or not 0 <= begin <= end <= available:
        raise CheckpointError(
            f"{path}: tensor {name} claims bytes {begin:,} to {end:,} of {available:,}"
        )
    dtype = FLOAT_TYPES.get(kind, torch.int64 if kind == "I64" else torch.uint8)
    if kind in FLOAT_TYPES and prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and type {kind} has "
            f"{end - begin:,} bytes, {prod(shape) * dtype.itemsize:,} are needed"
        )
    return shape, dtype


def _load(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error


def read_pickle(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Any], str]:
    """Tensors, settings and the trainer's code of a torch.save() file, mapped, not read.

    A pickle is a program. Only one that builds tensors and plain values is let run; a mapped file
    takes no memory until a tensor is read.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(len(LEGACY)) == LEGACY:
                raise CheckpointError(
                    f"{path}: is in the format from before PyTorch 1.6, which cannot be mapped; "
                    "load it with torch.load(..., weights_only=True) and torch.save it again"
                )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        raise CheckpointError(
            f"{path}: refused, since its pickle wants more than tensors and plain values: "
            f"{reason[:300]}"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise CheckpointError(f"{path}: cannot be read as a torch file: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    state = next((content[k] for k in STATES if isinstance(content.get(k), dict)), content)
    found: dict[str, StoredTensor] = {}
    for stored, tensor in state.items():
        if not isinstance(tensor, Tensor):
            if state is content:
                continue
            raise CheckpointError(f"{path}: {stored} is a {type(tensor).__name__}, not a tensor")
        name = _plain(str(stored))
        _check_tensor(path, name, tensor)
        if name in found:
            raise CheckpointError(f"{path}: tensor {name} is there twice, as {stored} too")
        load = partial(_detached, tensor)
        found[name] = StoredTensor(name, tuple(tensor.shape), tensor.dtype, path, load)
    settings: dict[str, Any] = next(
        (content[k] for k in SETTINGS if isinstance(content.get(k), dict)), {}
    )
    code = content.get("code")
    return found, dict(settings), code if isinstance(code, str) else ""


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _check_tensor(path: Path, name: str, tensor: Tensor) -> None:
    """Raise where a tensor is not plain values that lie in the file, each once."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: tensor {name} is sparse, quantised or without values")
    claimed, there = tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes()
    if claimed > there:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(tensor.shape)} claims {claimed:,} bytes; "
            f"the file has {there:,}"
        )
