"""nanoGPT's alphabets, which are pickles."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from engine.errors import TokenizerError

CHARACTERS_FILE = "meta.pkl"


class _PlainUnpickler(pickle.Unpickler):
    """Builds dicts, texts and numbers; anything that has to be imported is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise TokenizerError(f"{CHARACTERS_FILE}: refused, since it wants {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise TokenizerError(f"{CHARACTERS_FILE}: refused, since it wants object {pid!r}")


def read_characters(path: Path) -> list[str]:
    """nanoGPT's character-level alphabet, by id. Raises TokenizerError."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except TokenizerError:
        raise
    except Exception as error:  # a broken pickle fails in any way at all
        raise TokenizerError(f"{path}: cannot be read: {error!r}") from error
    itos = content.get("itos") if isinstance(content, dict) else None
    if isinstance(itos, dict) and set(itos) == set(range(len(itos))):
        characters = [itos[i] for i in range(len(itos))]
        if all(isinstance(c, str) and len(c) == 1 for c in characters):
            return characters
    raise TokenizerError(f"{path}: needs `itos`, a character for each id from 0")
