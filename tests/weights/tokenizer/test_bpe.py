from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.frontend.tokenizer import Tokenizer
from weights.tokenizer.bpe import ranks_of, train_tokenizer, write_tokenizer
from weights.tokenizer.vocabulary import END_OF_TEXT

TEXT = [
    "The old captain looked at the sea, and the sea looked at the captain.\n",
    "It was 1851; the whale isn't here, they'd said \u2014 na\u00efve!\n\n",
] * 20
HELD_OUT = [
    "The captains' 12345 seas:\n\n\n  they'll   see \u00e9t\u00e9 \U0001f40b.\t\r\nEnd ",
    "",
    " \n x",
    "\x00\x7f 'S don't DON'T",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    tokenizer = train_tokenizer(TEXT, 300)
    directory = tmp_path_factory.mktemp("bpe")
    write_tokenizer(directory, ranks_of(tokenizer))
    return tokenizer, Tokenizer.from_directory(directory)


@pytest.mark.parametrize("text", [*TEXT[:2], *HELD_OUT])
def test_tiktoken_gives_the_ids_of_tokenizers(trained: tuple[Any, Tokenizer], text: str) -> None:
    tokenizer, stored = trained
    ids = stored.encode(text)
    assert ids == tokenizer.encode(text).ids
    assert stored.decode(ids) == text


def test_the_end_of_text_follows_the_ranks(trained: tuple[Any, Tokenizer]) -> None:
    _, stored = trained
    assert len(stored) == 301
    assert stored.special_tokens == {END_OF_TEXT: 300}
    assert 300 not in stored.encode(END_OF_TEXT)


def test_the_shipped_tokenizer_is_whole() -> None:
    stored = Tokenizer.from_directory(Path(__file__).parents[3] / "weights" / "default")
    assert len(stored) == 8192
    assert not stored.unused_ids
    assert stored.decode(stored.encode(HELD_OUT[0])) == HELD_OUT[0]
