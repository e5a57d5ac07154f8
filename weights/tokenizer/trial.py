"""Whether a converted tokenizer is the one it was: tried against `tokenizers`, not assumed."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from typing import Any

from engine.errors import TokenizerError
from engine.frontend.tokenizer import Tokenizer
from weights.tokenizer.vocabulary import Vocabulary

TRIALS = 2000
"""Random texts on which a converted tokenizer must agree."""

WORDS: tuple[str, ...] = (
    " the",
    "don't",
    "we'LL",
    "  ",
    "\n\n",
    "\t",
    "é",
    "e\u0301",
    "1234567",
    "٣",
    "中文字",
)
WORDS += ("🙂", "👩\u200d👩\u200d👧", "\u00a0", "\u2028", "\u200b", "ß", "ﬁ", "İ", "'s", "_x")
WORDS += ("\r\n", "…", "\x00", " ", "   ", "\t\t", "\u212b")
WORDS += ("\u1112\u1161\u11ab", "q\u0323\u0307", "a\u0301\u0323")


def trial_texts(vocabulary: Vocabulary) -> Iterator[str]:
    """Every token by itself, words with accents and spaces, and random characters.

    Where text is normalised, every mark of today's Unicode before another one.
    """
    for token in vocabulary.tokens:
        try:
            yield token.decode("utf-8")
        except UnicodeDecodeError:
            continue
    words = list(WORDS)
    if vocabulary.preparation is not None:
        words += [each.text for each in vocabulary.preparation.added]
        yield from (f"x{text}y {text}{text} {text}" for text in words)
        if vocabulary.preparation.normalization is not None:
            for mark in filter(unicodedata.combining, map(chr, range(0x110000))):
                yield f"a{mark}\u0334\u0301{mark}"
    generator = random.Random(0)
    for _ in range(TRIALS):
        pieces = [
            generator.choice(words)
            if generator.random() < 0.5
            else chr(generator.choice((generator.randrange(0x300), generator.randrange(0xD800))))
            for _ in range(generator.randrange(1, 24))
        ]
        yield "".join(pieces)


def compare(ours: Tokenizer, reference: Any, vocabulary: Vocabulary, name: str) -> None:
    """Raise TokenizerError for the first text on which ours differs from the library's."""
    texts = [t for t in trial_texts(vocabulary) if not any(s in t for s in vocabulary.special)]
    for text, theirs in zip(texts, reference.encode_batch(texts), strict=True):
        ids = ours.encode(text)
        if ids != theirs.ids:
            raise TokenizerError(
                f"{name}: as tiktoken ranks it gives {ids[:8]} for {text[:40]!r}, the "
                f"`tokenizers` library {theirs.ids[:8]}; it cannot be served as it is"
            )
    output = [[token_id] for token_id in range(len(ours)) if token_id in ours]
    output += [ours.encode(text) for text in texts[-TRIALS:]]
    for ids, theirs in zip(output, reference.decode_batch(output), strict=True):
        if ours.decode(ids) != theirs:
            raise TokenizerError(
                f"{name}: ids {ids[:8]} are {ours.decode(ids)[:40]!r}; the `tokenizers` library "
                f"decodes them to {theirs[:40]!r}"
            )
