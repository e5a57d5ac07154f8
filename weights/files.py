"""Which files make up a checkpoint. Nothing here loads torch, so that a server may ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

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
    if not weights.name.endswith(".index.json"):
        return [weights]
    names = read_json(weights).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{weights}: has no weight_map")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if Path(name).name != name or name not in names.values():
            raise CheckpointError(f"{weights}: shard {name!r} is not a plain file name")
    return [weights.parent / name for name in files]


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
