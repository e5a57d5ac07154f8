"""A byte-level BPE as ranks, and when merges can be ranks: by their order."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine.errors import TokenizerError
from engine.frontend.preparation import Preparation
from engine.frontend.tokenizer import CONFIG_FILE, RANKS_FILE, Tokenizer

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE. tokens: ids by their bytes; special: names of ids that no text becomes.

    preparation: what becomes of a text before the split.
    """

    pattern: str
    tokens: Mapping[bytes, int]
    special: Mapping[str, int]
    preparation: Preparation | None = None

    def tokenizer(self) -> Tokenizer:
        """As it is served. Raises TokenizerError."""
        return Tokenizer(self.pattern, self.tokens, self.special, self.preparation)

    def write(self, directory: Path) -> None:
        """The two tokenizer files of a model directory."""
        lines = (
            f"{base64.b64encode(token).decode()} {rank}\n"
            for token, rank in sorted(self.tokens.items(), key=lambda item: item[1])
        )
        (directory / RANKS_FILE).write_text("".join(lines), encoding="ascii")
        config: dict[str, Any] = {
            "pattern": self.pattern,
            "special_tokens": dict(self.special),
        }
        if self.preparation is not None:
            config |= self.preparation.to_config()
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def bytes_of_printable() -> dict[str, int]:
    """GPT-2's stand-ins: the printable character that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def ranked(
    path: Path,
    pattern: str,
    vocab: Mapping[str, int],
    merges: Sequence[str],
    special: Mapping[str, int],
    preparation: Preparation | None,
) -> Vocabulary:
    """Ranks of a vocabulary; refused where the order of its merges is not that of its ids.

    special: tokens that no text becomes; GPT-2's end of text is one even where nothing says so.
    Raises TokenizerError.
    """
    byte = bytes_of_printable()
    merged = ["".join(merge.split(" ")) for merge in merges]
    reachable = {*byte, *merged}
    added = {each.text: each.id for each in preparation.added} if preparation else {}
    named, plain = dict(special), {}
    for token, rank in vocab.items():
        if token in special or (token in added and token not in reachable):
            continue
        if token in reachable:
            plain[token] = rank
        elif token == END_OF_TEXT:
            named[token] = rank
        else:
            raise TokenizerError(f"{path}: no merge makes token {token!r}, id {rank}")
    ids = [vocab.get(token, -1) for token in merged]
    if any(a >= b for a, b in pairwise(ids)) or (ids and ids[0] < 0):
        raise TokenizerError(f"{path}: the ids do not follow the order of the merges")
    try:
        tokens = {bytes(byte[c] for c in token): rank for token, rank in plain.items()}
    except KeyError as error:
        raise TokenizerError(f"{path}: not a byte-level vocabulary: {error} in it") from error
    return Vocabulary(pattern, tokens, named, preparation)
