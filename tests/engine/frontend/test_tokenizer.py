"""Tokenizers from local files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.frontend.tokenizer import Tokenizer
from tests.models import EOS, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_model_dir)


@given(text=st.text())
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_text_is_only_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|endoftext|>")
    assert EOS not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"
    assert tokenizer.decode([EOS]) == ""


def test_ids(tokenizer: Tokenizer) -> None:
    assert len(tokenizer) == EOS + 1
    assert EOS in tokenizer
    assert EOS + 1 not in tokenizer
    assert -1 not in tokenizer
    assert tokenizer.unused_ids == []
    with pytest.raises(KeyError):
        tokenizer.token_bytes(EOS + 1)


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


def test_gap_in_the_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace(str(EOS), str(EOS + 2)))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.unused_ids == [EOS, EOS + 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.tiktoken", None, "no tokenizer.tiktoken"),
        ("tokenizer.tiktoken", "IQ== 0 0", ":1: expected `base64 rank`"),
        ("tokenizer.tiktoken", "I! 0", ":1: expected `base64 rank`"),
        ("tokenizer.tiktoken", "IQ== 0", "242 single bytes have no rank, first 0"),
        ("tokenizer_config.json", None, "cannot be read as JSON"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("tokenizer_config.json", "{}", "needs a text `pattern`"),
        ("tokenizer_config.json", '{"pattern": "("}', "cannot be built"),
        (
            "tokenizer_config.json",
            '{"pattern": ".", "special_tokens": {"<|endoftext|>": 3}}',
            "share an id",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_directory(tmp_path)
