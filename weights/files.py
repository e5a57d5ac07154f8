"""Which files make up a checkpoint. Nothing here loads torch, so that a server may ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.files import shards_in

SETTINGS_FILES = ("config.json", "model_config.yaml")
LITGPT = ("lit_model.pth", "model_config.yaml")
"""LitGPT's weights and their settings; a config.json beside them is that of another format."""

WEIGHTS_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    LITGPT[0],
    "ckpt.pt",
)
"""What a directory is searched for, in this order."""

TOKENIZER_FILES = (
    "tokenizer.tiktoken",
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.bpe",
    "merges.txt",
    "encoder.json",
    "vocab.json",
    "added_tokens.json",
    "meta.pkl",
)
"""What a tokenizer is made from."""

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own limit."""


def weights_file(path: Path) -> Path:
    """The file, or the one of a directory that holds the weights, or the index of its shards.

    Raises CheckpointError.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or directory")
    for name in WEIGHTS_FILES:
        if (path / name).is_file():
            return path / name
    for pattern in ("*.safetensors", "*.pt", "*.pth", "*.bin"):
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{path}: {len(files)} {pattern} files in it; name one of them")
    raise CheckpointError(f"{path}: no weights in it; looked for {', '.join(WEIGHTS_FILES)}")


def shards_of(weights: Path) -> list[Path]:
    """The files that an index names, else the file itself. Raises CheckpointError."""
    return shards_in(weights) if weights.name.endswith(".index.json") else [weights]


def settings_file(weights: Path) -> Path | None:
    """Where the settings of a weights file would be said, if there is such a file."""
    names = LITGPT[1:] if weights.name == LITGPT[0] else SETTINGS_FILES
    return next((weights.parent / n for n in names if (weights.parent / n).is_file()), None)


def checkpoint_files(path: Path) -> list[Path]:
    """All that a conversion reads: weights, settings, tokenizer. Raises CheckpointError."""
    weights = weights_file(path)
    shards = [weights, *(shard for shard in shards_of(weights) if shard != weights)]
    beside = (weights.parent / name for name in (*SETTINGS_FILES, *TOKENIZER_FILES))
    return [*shards, *(file for file in beside if file.is_file())]


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a safetensors file says of each tensor, by name, and the bytes that they have.

    (The library's own way to the names loads NumPy: 10 MB of every HTTP process.) Raises
    CheckpointError.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: the header claims {length:,} bytes of a file of {size:,}"
                )
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: cannot be read as safetensors: the header is no object")
    header.pop("__metadata__", None)
    return header, size - 8 - length
