"""The vocabulary: a byte-level BPE, trained with `tokenizers`, stored as tiktoken ranks.

That is MODEL_DIR/tokenizer.tiktoken (a line per token: base64 of its bytes, a space, its rank) and
MODEL_DIR/tokenizer_config.json (split pattern, special tokens).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from weights.tokenizer.vocabulary import END_OF_TEXT, bytes_of_printable

# GPT-2's split, with two changes: numbers in groups of at most three digits, so that a small
# vocabulary is not spent on years; and a line break is never joined to the word that follows it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of vocab_size tokens, the end-of-text token not among them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def ranks_of(tokenizer: tokenizers.Tokenizer) -> dict[bytes, int]:
    """Token bytes -> rank. Ids of the alphabet come first, then merges in order: ids are ranks."""
    byte = bytes_of_printable()
    return {bytes(byte[c] for c in token): rank for token, rank in tokenizer.get_vocab().items()}


def write_tokenizer(model_dir: Path, ranks: dict[bytes, int]) -> None:
    """The two tokenizer files of a model directory; the end of text follows the last rank."""
    model_dir.mkdir(parents=True, exist_ok=True)
    lines = (
        f"{base64.b64encode(t).decode()} {r}\n"
        for t, r in sorted(ranks.items(), key=lambda i: i[1])
    )
    (model_dir / "tokenizer.tiktoken").write_text("".join(lines), encoding="ascii")
    config = {
        "pattern": PATTERN,
        "special_tokens": {END_OF_TEXT: len(ranks)},
        "eos_token_id": len(ranks),
    }
    (model_dir / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
