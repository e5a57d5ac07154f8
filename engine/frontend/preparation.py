"""What becomes of a text before it is split: normalisation, added tokens, a space before it.

As the `tokenizers` library does it: added tokens that are not normalised are cut out of the text as
it came, the rest is normalised, the other added tokens are cut out of that, and what is left
between them is split and merged. At each place the longest added token counts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import TokenizerError

# Characters that Unicode 9 did not have, and that today's normalisation moves or composes. The
# library normalises by Unicode 9, as GPT-NeoX was trained; to it they are like any letter.
LATER = re.compile(
    "(["
    "\u05c8\u05c9\u07fd\u0897-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b\u0d3c\u0eba\u1715\u1abf-\u1af0"
    "\u1df6-\u1dfa\ua82c\U000105c9\U000105d2\U000105da\U000105e4\U00010d24-\U00010d27"
    "\U00010d69-\U00010d6d\U00010eab\U00010eac\U00010ecb-\U00010ecf\U00010ef0-\U00010efb"
    "\U00010efd-\U00010eff\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b"
    "\U00011382-\U00011385\U0001138b\U0001138e\U00011390\U00011391\U000113b8\U000113bb\U000113c2"
    "\U000113c5\U000113c7-\U000113c9\U000113ce-\U000113d0\U0001145e\U00011839\U0001183a"
    "\U00011930\U00011935\U00011938\U0001193d\U0001193e\U00011943\U000119e0\U00011a34\U00011a47"
    "\U00011a99\U00011d42\U00011d44\U00011d45\U00011d97\U00011f41\U00011f42"
    "\U0001611e-\U00016129\U0001612f\U00016d63\U00016d67-\U00016d6a\U00016ff0\U00016ff1"
    "\U0001d127\U0001d128\U0001d250-\U0001d252\U0001d25f\U0001d280\U0001d281\U0001e08f"
    "\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef\U0001e4ec-\U0001e4ef"
    "\U0001e5ee\U0001e5ef\U0001e6e3\U0001e6e6\U0001e6ee\U0001e6ef\U0001e6f5"
    "])"
)

CHARACTERS_PER_BYTE = 2
"""At most 3 characters compose to one of 2 bytes; so a token never takes more than this."""


def nfc(text: str) -> str:
    """Normalisation form C of Unicode 9."""
    if unicodedata.is_normalized("NFC", text):
        # Also by Unicode 9: what it moves and composes, it still does today.
        return text
    return "".join(
        piece if at % 2 else unicodedata.normalize("NFC", piece)
        for at, piece in enumerate(LATER.split(text))
    )


@dataclass(frozen=True)
class AddedToken:
    """A text that is a token wherever it stands. normalized: sought in the normalised text."""

    text: str
    id: int
    normalized: bool


class Preparation:
    """A text into pieces: ids of added tokens, and what lies between them, ready to be split."""

    def __init__(
        self, added: Sequence[AddedToken], normalization: str | None, prefix_space: bool
    ) -> None:
        """normalization: NFC or None. prefix_space: put before a piece that begins without one.

        Raises TokenizerError where a text is empty, or two tokens have the same.
        """
        if normalization not in (None, "NFC"):
            raise TokenizerError(f"normalization must be NFC or null, got {normalization!r}")
        self.added = tuple(added)
        self.normalization = normalization
        self.prefix_space = prefix_space
        self._raw = _Finder({a.text: a.id for a in added if not a.normalized})
        self._normalized = _Finder({self._normalize(a.text): a.id for a in added if a.normalized})
        if len(self._raw.ids) + len(self._normalized.ids) != len(added) or any(
            not each.text for each in added
        ):
            raise TokenizerError("added_tokens must have texts, each a different one")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preparation | None:
        """From tokenizer_config.json; None where it asks for nothing. Raises TokenizerError."""
        added, prefix_space = config.get("added_tokens", []), config.get("prefix_space", False)
        if not isinstance(prefix_space, bool):
            raise TokenizerError(f"prefix_space must be true or false, got {prefix_space!r}")
        if not isinstance(added, list) or not all(_is_token(each) for each in added):
            raise TokenizerError(
                "added_tokens must be a list of objects with text, id and normalized"
            )
        normalization = config.get("normalization")
        if not added and normalization is None and not prefix_space:
            return None
        tokens = [AddedToken(**each) for each in added]
        return cls(tokens, normalization, prefix_space)

    def to_config(self) -> dict[str, Any]:
        """What from_config reads."""
        added = [vars(each) for each in self.added]
        return {
            "normalization": self.normalization,
            "prefix_space": self.prefix_space,
            "added_tokens": added,
        }

    def _normalize(self, text: str) -> str:
        return text if self.normalization is None else nfc(text)

    def pieces(self, text: str) -> Iterator[str | int]:
        """Texts to be split, and ids, in order."""
        for raw in self._raw.pieces(text):
            if isinstance(raw, int):
                yield raw
                continue
            for piece in self._normalized.pieces(self._normalize(raw)):
                if isinstance(piece, str) and self.prefix_space and not piece.startswith(" "):
                    yield " " + piece
                else:
                    yield piece


def _is_token(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"text", "id", "normalized"}
        and isinstance(value["text"], str)
        and type(value["id"]) is int
        and isinstance(value["normalized"], bool)
    )


class _Finder:
    """Cuts texts out of a text: the leftmost, and there the longest."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def pieces(self, text: str) -> Iterator[str | int]:
        """What lies between, and ids; nothing that is empty."""
        found = self._pattern.split(text) if self.ids else [text]
        for at, piece in enumerate(found):
            if piece:
                yield self.ids[piece] if at % 2 else piece
