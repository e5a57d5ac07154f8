"""Text to token ids and back, by a tiktoken encoding built from local files."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from engine.errors import TokenizerError
from engine.files import read_json
from engine.frontend.preparation import CHARACTERS_PER_BYTE, Preparation

RANKS_FILE = "tokenizer.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
RANK = re.compile(rb"((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?) (\d{1,9})")
"""A line of a ranks file."""

UTF8_BYTES = (*range(0xC0), *range(0xC2, 0xF5))
"""All that a text can hold; GPT-NeoX has no tokens for the others."""


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Lines of `base64(token) rank`, as tiktoken publishes them."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        match = RANK.fullmatch(line)
        if match is not None:
            ranks[base64.b64decode(match[1])] = int(match[2])
        elif line:
            raise TokenizerError(f"{path}:{number}: expected `base64 rank`, got {line!r}")
    missing = [byte for byte in UTF8_BYTES if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{path}: {len(missing)} single bytes have no rank, first {missing[0]}"
        )
    return ranks


def _read_split(path: Path) -> dict[str, Any]:
    """The settings of a byte-level BPE, of which the split and the special tokens are checked."""
    config = read_json(path, TokenizerError)
    if not isinstance(config.get("pattern"), str):
        raise TokenizerError(f"{path}: needs a text `pattern`, the regular expression of the split")
    special = config.get("special_tokens", {})
    if not isinstance(special, dict) or not all(type(each) is int for each in special.values()):
        raise TokenizerError(f"{path}: special_tokens must be an object of names and ids")
    return config


class Tokenizer:
    """A byte-level BPE. Text of special tokens in a prompt is text, nothing more."""

    def __init__(
        self,
        pattern: str,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        preparation: Preparation | None = None,
    ) -> None:
        """pattern: the split; ranks: token -> id and priority; special_tokens: name -> id.

        preparation: what becomes of a text before the split.
        Raises TokenizerError where tiktoken refuses them or two tokens share an id.
        """
        self._preparation = preparation
        added = {} if preparation is None else {a.id: a.text.encode() for a in preparation.added}
        # The same bytes by a merge and by being cut out of the text may be the same token.
        self._added = {i: text for i, text in added.items() if ranks.get(text) != i}
        ids = [*ranks.values(), *special_tokens.values(), *self._added]
        if len(set(ids)) != len(ids) or (preparation and len(added) != len(preparation.added)):
            raise TokenizerError("two tokens of the tokenizer share an id")
        self.special_tokens = dict(special_tokens)
        self._special_ids = frozenset(special_tokens.values())
        self._size = max(ids) + 1
        self._unused = frozenset(range(self._size)).difference(ids)
        try:
            self._encoding = tiktoken.Encoding(
                "ropeway",
                pat_str=pattern,
                mergeable_ranks=dict(ranks),
                special_tokens=dict(special_tokens),
            )
        except ValueError as error:
            raise TokenizerError(f"the tokenizer cannot be built: {error}") from error
        normalizes = preparation is not None and preparation.normalization is not None
        longest = max(map(len, [*ranks, *added.values()]))
        self.longest_token = longest * (CHARACTERS_PER_BYTE if normalizes else 1)
        """Characters of a text that may become one token, at most."""

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """The tokenizer of a model directory. Raises TokenizerError, naming the file."""
        path = directory / RANKS_FILE
        if not path.is_file():
            settings = directory / CONFIG_FILE
            if settings.is_file() and "characters" in read_json(settings, TokenizerError):
                return CharacterTokenizer.from_directory(directory)
            raise TokenizerError(f"{directory}: no {RANKS_FILE} in it")
        config = _read_split(directory / CONFIG_FILE)
        try:
            preparation = Preparation.from_config(config)
        except TokenizerError as error:
            raise TokenizerError(f"{directory / CONFIG_FILE}: {error}") from error
        special = config.get("special_tokens", {})
        return cls(config["pattern"], _read_ranks(path), special, preparation)

    def __len__(self) -> int:
        """One more than the highest id."""
        return self._size

    def __contains__(self, token_id: int) -> bool:
        return 0 <= token_id < self._size and token_id not in self._unused

    @property
    def unused_ids(self) -> list[int]:
        """Ids below the highest that no token has, ascending."""
        return sorted(self._unused)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        ValueError for a lone surrogate, which UTF-8 cannot hold, and for what makes the regular
        expression give up (a million spaces).
        """
        text.encode("utf-8")
        if self._preparation is None:
            return self._encode(text)
        ids: list[int] = []
        for piece in self._preparation.pieces(text):
            ids += [piece] if isinstance(piece, int) else self._encode(piece)
        return ids

    def _encode(self, text: str) -> list[int]:
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of tiktoken's Rust; no Exception
                raise
            raise ValueError("the tokenizer's regular expression gives up on it") from error

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; nothing for a special one. KeyError where no token has the id."""
        if token_id in self._special_ids:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        return self._encoding.decode_single_token_bytes(token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class CharacterTokenizer(Tokenizer):
    """An alphabet: each character is a token, as in nanoGPT's first examples."""

    def __init__(self, characters: Sequence[str]) -> None:
        """characters: by id. Raises TokenizerError where one is there twice, or is not one."""
        self._id = {character: token_id for token_id, character in enumerate(characters)}
        if len(self._id) != len(characters) or any(len(each) != 1 for each in characters):
            raise TokenizerError("characters must be single ones, each there once")
        try:
            self._bytes = [character.encode("utf-8") for character in characters]
        except UnicodeEncodeError as error:
            raise TokenizerError(f"characters: {error}") from error
        if not characters:
            raise TokenizerError("characters must not be empty")
        self.special_tokens = {}
        self._size, self._unused = len(characters), frozenset()
        self.longest_token = max(map(len, self._bytes))

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """From `characters` in tokenizer_config.json. Raises TokenizerError, naming the file."""
        path = directory / CONFIG_FILE
        characters = read_json(path, TokenizerError).get("characters")
        if not isinstance(characters, list) or not all(isinstance(c, str) for c in characters):
            raise TokenizerError(f"{path}: `characters` must be a list of texts")
        try:
            return cls(characters)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. UnicodeEncodeError for a character that the alphabet lacks."""
        for at, character in enumerate(text):
            if character not in self._id:
                reason = f"the model's alphabet of {len(self._id)} characters lacks it"
                raise UnicodeEncodeError("alphabet", text, at, at + 1, reason)
        return [self._id[character] for character in text]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token. KeyError where no token has the id."""
        if token_id not in self:
            raise KeyError(token_id)
        return self._bytes[token_id]
