"""Files of a model that hold JSON: its settings, its tokenizer's, the index of its shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError, RopewayError


def read_json(path: Path, refusal: type[RopewayError] = CheckpointError) -> dict[str, Any]:
    """A JSON object. Raises the refusal, naming the file, where it cannot be read or is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refusal(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise refusal(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def shards_in(index: Path) -> list[Path]:
    """The files that an index of Hugging Face's form names, beside it. Raises CheckpointError."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: has no weight_map")
    files = sorted(set(map(str, names.values())))
    for name in files:
        if Path(name).name != name or name not in names.values():
            raise CheckpointError(f"{index}: shard {name!r} is not a plain file name")
    return [index.parent / name for name in files]
