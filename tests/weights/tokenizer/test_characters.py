"""Alphabets of single characters come over, and pickles do no harm."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.frontend.tokenizer import Tokenizer
from weights.tokenizer.characters import read_characters
from weights.tokenizer.convert import convert_tokenizer


def test_characters(tmp_path: Path) -> None:
    alphabet = sorted(set("To be, or not to be?\né"))
    ids = {c: i for i, c in enumerate(alphabet)}
    meta = {"vocab_size": len(alphabet), "itos": dict(enumerate(alphabet)), "stoi": ids}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    out = tmp_path / "out"
    out.mkdir()
    assert convert_tokenizer(tmp_path, out) == f"meta.pkl, {len(alphabet)} characters"
    tokenizer = Tokenizer.from_directory(out)
    assert tokenizer.encode("to bé") == [ids[c] for c in "to bé"]
    assert tokenizer.decode(tokenizer.encode("or not")) == "or not"
    assert (len(tokenizer), tokenizer.unused_ids, tokenizer.longest_token) == (len(alphabet), [], 2)
    with pytest.raises(UnicodeEncodeError, match=r"alphabet of .* lacks it"):
        tokenizer.encode("x")
    with pytest.raises(KeyError):
        tokenizer.token_bytes(99)
    again = tmp_path / "again"
    again.mkdir()
    assert convert_tokenizer(out, again) == "tokenizer_config.json, characters"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"itos": {0: "a", 2: "b"}}, "needs `itos`"),
        ({"itos": {0: "ab"}}, "needs `itos`"),
        ([1], "needs `itos`"),
        ({"itos": {0: Path("x")}}, "refused, since it wants pathlib"),
    ],
)
def test_alphabets_that_cannot_be(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        read_characters(tmp_path / "meta.pkl")


@given(content=st.binary(max_size=64))
@settings(max_examples=200)
def test_any_pickle(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(TokenizerError):
        read_characters(path)
