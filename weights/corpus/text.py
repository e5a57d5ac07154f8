"""Text to train on, as documents by source: a folder of .txt files, or what weights.corpus wrote.

A .txt file is a document. Files directly in the folder belong to the source named as the folder,
those in a subfolder to the source named as that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from weights.corpus.sources import read_documents

Documents = dict[str, list[str]]
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True)
class Texts:
    """Documents by source, parted into what is trained on and what is kept from it."""

    train: Documents
    held_out: Documents

    @property
    def size(self) -> int:
        """Bytes to train on."""
        return sum(size_of(documents) for documents in self.train.values())


def size_of(documents: Sequence[str]) -> int:
    """Bytes of UTF-8."""
    return sum(len(document.encode()) for document in documents)


def split_documents(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """Keep the end: about `share` of the bytes, parted where a paragraph ends if that is near."""
    wanted = size_of(documents) * share
    kept: list[str] = []
    rest = list(documents)
    while rest and wanted >= 1:
        last = rest.pop()
        size = len(last.encode())
        if size <= wanted:
            kept.insert(0, last)
            wanted -= size
            continue
        cut = len(last) - round(len(last) * wanted / size)
        ends = [match.end() for match in _PARAGRAPH.finditer(last)]
        near = min(ends, key=lambda end: abs(end - cut), default=cut)
        cut = near if 0 < near < len(last) and abs(near - cut) <= len(last) * share else cut
        rest.append(last[:cut])
        if cut < len(last):
            kept.insert(0, last[cut:])
        break
    return rest, kept


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error


def read_texts(folder: Path, share: float) -> Texts:
    """Raises ConfigError where there is no text, or none that can be read."""
    if not folder.exists():
        raise ConfigError(f"{folder}: no such file or folder")
    if (folder / "train").is_dir() and (written := sorted(folder.glob("train/*.jsonl"))):
        held_out = sorted(folder.glob("heldout/*.jsonl"))
        return Texts(
            {path.stem: read_documents(path) for path in written},
            {path.stem: read_documents(path) for path in held_out},
        )
    files = sorted(folder.rglob("*.txt")) if folder.is_dir() else []
    if folder.is_file():
        files, folder = [folder], folder.parent
    sources: Documents = {}
    for path in files:
        inside = path.relative_to(folder).parts
        name = inside[0] if len(inside) > 1 else folder.resolve().name or "text"
        if text := _read(path).strip():
            sources.setdefault(name, []).append(text)
    if not sources:
        raise ConfigError(f"{folder} holds no text: expected .txt files, there or in subfolders")
    parts = {name: split_documents(documents, share) for name, documents in sources.items()}
    return Texts(
        {name: train for name, (train, _) in parts.items() if train},
        {name: kept for name, (_, kept) in parts.items() if kept},
    )
