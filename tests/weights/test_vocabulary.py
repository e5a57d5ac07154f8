"""Tokenizers come over as they are, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from engine.errors import TokenizerError
from engine.frontend.tokenizer import Tokenizer as Ours
from tests.models import write_tokenizer
from weights.bpe import train_tokenizer
from weights.inspect import sample_text
from weights.vocabulary import convert_tokenizer, read_characters


def trained(special: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text().splitlines(keepends=True), trainer)
    if special:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Ours]:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    tokenizer = trained()
    tokenizer.save(str(source / "tokenizer.json"))
    assert convert_tokenizer(source, out) == "tokenizer.json"
    return tokenizer, Ours.from_directory(out)


@given(text=st.text())
@settings(max_examples=300)
def test_tokenizer_json_on_any_text(pair: tuple[Tokenizer, Ours], text: str) -> None:
    theirs, ours = pair
    assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode(text)) == text


def test_special_tokens(pair: tuple[Tokenizer, Ours]) -> None:
    theirs, ours = pair
    assert ours.special_tokens == {"<|endoftext|>": theirs.token_to_id("<|endoftext|>")}
    assert len(ours) == theirs.get_vocab_size()


def test_a_split_of_its_own(tmp_path: Path) -> None:
    theirs = train_tokenizer(sample_text().splitlines(keepends=True), 500)
    theirs.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out"
    out.mkdir()
    convert_tokenizer(tmp_path, out)
    ours = Ours.from_directory(out)
    for text in (sample_text(), "In 1234567 years\n\n  it's  \tthere\r\n "):
        assert ours.encode(text) == theirs.encode(text).ids


def test_gpt2s_two_files(tmp_path: Path, pair: tuple[Tokenizer, Ours]) -> None:
    theirs, ours = pair
    content = json.loads(theirs.to_str())["model"]
    vocab = content["vocab"] | {"<|endoftext|>": len(content["vocab"])}
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    for merge_file, vocab_file in (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")):
        source, out = tmp_path / merge_file, tmp_path / f"{merge_file}.out"
        source.mkdir()
        out.mkdir()
        (source / merge_file).write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        with pytest.raises(TokenizerError, match=r"needs encoder.json or vocab.json"):
            convert_tokenizer(source, out)
        (source / vocab_file).write_text(json.dumps(vocab))
        assert convert_tokenizer(source, out).startswith(merge_file)
        converted = Ours.from_directory(out)
        assert converted.encode(sample_text()) == ours.encode(sample_text())
        assert converted.special_tokens == ours.special_tokens


def _lowercase(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def _prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _whitespace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def _added(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("  ", special=False)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lowercase, r"normalises text \(Lowercase\)"),
        (_prefix_space, "puts a space before each text"),
        (_whitespace, r"its split \(Whitespace\) is not a byte-level one"),
        (_added, "'  ' was added without being special"),
    ],
)
def test_what_would_differ_is_refused(
    tmp_path: Path, change: Callable[[Tokenizer], None], message: str
) -> None:
    tokenizer = trained()
    change(tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=message):
        convert_tokenizer(tmp_path, tmp_path)


def test_merges_that_ranks_cannot_express(tmp_path: Path) -> None:
    tokenizer = trained()
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match="ids do not follow the order of the merges"):
        convert_tokenizer(tmp_path, tmp_path)


def test_ranks_without_a_pattern(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    assert "as it was" in convert_tokenizer(tmp_path, out)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match=r"267 ranks without a tokenizer_config.json"):
        convert_tokenizer(tmp_path, out)


def test_characters(tmp_path: Path) -> None:
    alphabet = sorted(set("To be, or not to be?\né"))
    meta = {
        "vocab_size": len(alphabet),
        "itos": dict(enumerate(alphabet)),
        "stoi": {c: i for i, c in enumerate(alphabet)},
    }
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    out = tmp_path / "out"
    out.mkdir()
    assert convert_tokenizer(tmp_path, out) == f"meta.pkl, {len(alphabet)} characters"
    tokenizer = Ours.from_directory(out)
    assert tokenizer.encode("to bé") == [meta["stoi"][c] for c in "to bé"]  # type: ignore[index]
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
