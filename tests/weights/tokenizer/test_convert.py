"""Tokenizers come over as they are, or not at all."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from engine.errors import TokenizerError
from engine.frontend.output import Detokenizer
from engine.frontend.preparation import nfc
from engine.frontend.tokenizer import Tokenizer as Ours
from tests.models import write_tokenizer
from weights.inspect import sample_text
from weights.tokenizer.bpe import train_tokenizer
from weights.tokenizer.convert import convert_tokenizer

RELAXED = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


SPACES = [" " * n for n in range(24, 1, -1)]
TABS = ["\t" * n for n in range(9, 1, -1)]
STRUCTURES: dict[str, dict[str, Any]] = {
    "GPT-NeoX": {"normalizer": True, "added": SPACES},
    "GPT-NeoX, sought before": {"normalizer": True, "added": SPACES, "normalized": False},
    "a space before": {"normalizer": True, "added": SPACES, "prefix_space": True},
    "a space before, no more": {"added": [], "prefix_space": True},
    "CodeGen": {"added": [" " * n for n in range(31, 1, -1)] + TABS},
    "GPT-J": {"added": [f"<|extratoken_{n}|>" for n in range(1, 144)]},
    "overlapping": {"normalizer": True, "added": ["ab", "abc", "bcd", "z\u0323x", "a b"]},
    "overlapping, sought before": {
        "normalizer": True,
        "added": ["ab", "abc", "bcd", "e\u0301x", "\u212b", "\u0301"],
        "normalized": False,
    },
    "NFC only": {"normalizer": True, "added": []},
}


@pytest.fixture(scope="module", params=STRUCTURES)
def structure(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Ours, list[str]]:
    """A tokenizer.json as those of these models are made, the library's and ours."""
    made = STRUCTURES[request.param]
    tokenizer = trained(special=False)
    if made.get("normalizer"):
        tokenizer.normalizer = normalizers.NFC()
    space = made.get("prefix_space", False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, trim_offsets=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    normalized = made.get("normalized", True)
    tokenizer.add_tokens([AddedToken(t, normalized=normalized) for t in made["added"]])
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    tokenizer.save(str(source / "tokenizer.json"))
    assert convert_tokenizer(source, out) == "tokenizer.json"
    return tokenizer, Ours.from_directory(out), made["added"]


PIECES = [" ", "  ", "\t", "\n", "a", "abcd", "the", "e", "é", "z", "\u0301", "\u0323", "\u0307"]
PIECES += [
    "\u212b",
    "\u1112",
    "\u1161",
    "\u11ab",
    "가",
    "\u0344",
    "\u0ebb\u0eba",
    "\U00011935\U00011930",
]
PIECES += [
    "\U00011935\U00011930",
    "<|endoftext",
    "<|extratoken_1|>",
    "<|extratoken_14",
    "中",
    "🙂",
    "\u200d",
    "'s",
]


@given(data=st.data())
@RELAXED
def test_added_tokens_and_normalisation_on_any_text(
    structure: tuple[Tokenizer, Ours, list[str]], data: st.DataObject
) -> None:
    theirs, ours, added = structure
    pieces = st.one_of(
        st.text(max_size=5), st.characters(categories=["Mn"]), st.sampled_from(PIECES + added)
    )
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    assume("<|endoftext|>" not in text and "<|padding|>" not in text)
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids
    assert len(text) <= len(ids) * ours.longest_token  # what admission counts on
    detokenizer = Detokenizer(ours)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == ours.decode(ids) == theirs.decode(ids)


@given(data=st.data())
@RELAXED
def test_any_output_is_detokenised(
    structure: tuple[Tokenizer, Ours, list[str]], data: st.DataObject
) -> None:
    theirs, ours, _ = structure
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1), max_size=20))
    detokenizer = Detokenizer(ours)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == theirs.decode(ids)


def test_normalisation_of_every_character() -> None:
    """Each before, between and after marks that may move past it or compose with it."""
    library = normalizers.NFC()
    for number in range(0x110000):
        character = chr(number)
        if 0xD800 <= number < 0xE000:
            continue
        parts = unicodedata.normalize("NFD", character)
        for text in (f"a{character}\u0334\u0301", f"a\u0334{character}", parts):
            assert nfc(text) == library.normalize_str(text), ascii(text)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"normalization": "NFKC"}, "normalization must be NFC or null, got 'NFKC'"),
        ({"prefix_space": 1}, "prefix_space must be true or false, got 1"),
        ({"added_tokens": [{"text": "  "}]}, "objects with text, id and normalized"),
        ({"added_tokens": [{"text": "", "id": 999, "normalized": True}]}, "must have texts"),
        ({"added_tokens": [{"text": "q", "id": 1, "normalized": True}]}, "share an id"),
    ],
)
def test_preparations_that_cannot_be(tmp_path: Path, config: Any, message: str) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(TokenizerError, match=message):
        Ours.from_directory(tmp_path)


def test_added_tokens_beside_two_files(tmp_path: Path) -> None:
    """GPT-J and CodeGen, where they come without a tokenizer.json."""
    theirs = trained(special=False)
    content = json.loads(theirs.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["merges"]]
    size = len(content["vocab"])
    added = {"<|endoftext|>": size, "  ": size + 1, "<|extratoken_1|>": size + 2}
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    out = tmp_path / "out"
    out.mkdir()
    convert_tokenizer(tmp_path, out)
    ours = Ours.from_directory(out)
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.add_tokens(["  ", "<|extratoken_1|>"])
    for text in ("the   end<|extratoken_1|>  x", "a <|extratoken_1| > \n  "):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.special_tokens == {"<|endoftext|>": size}


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
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
        ]
    )


def _whitespace(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


def _strips(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("  ", special=False, lstrip=True)])


def _latin(tokenizer: Tokenizer) -> None:
    """A character that also stands for a byte: the library takes it for that byte."""
    tokenizer.add_tokens([AddedToken("ü", special=False)])


def _latins(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("über", special=False)])


def _undecoded(tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.WordPiece()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_lowercase, "normalises text by Lowercase; only NFC"),
        (_prefix_space, "puts a space before each word"),
        (_whitespace, r"its split \(Whitespace\) is not a byte-level one"),
        (_strips, "lstrip of token '  ' is not supported"),
        (_latin, "two tokens of the tokenizer share an id"),
        (_latins, "are 'über'; the `tokenizers` library decodes them to '\ufffdber'"),
        (_undecoded, r"its decoder \(WordPiece\) is not"),
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


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_bos_token": True}, "add_bos_token puts a token beside each text"),
        (
            {"add_prefix_space": True},
            "add_prefix_space is True, the tokenizer's own file says False",
        ),
        ({"add_prefix_space": False, "add_bos_token": False, "unk_token": "x"}, None),
    ],
)
def test_what_hugging_face_adds(tmp_path: Path, config: Any, message: str | None) -> None:
    trained().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    if message is None:
        assert convert_tokenizer(tmp_path, out) == "tokenizer.json"
    else:
        with pytest.raises(TokenizerError, match=message):
            convert_tokenizer(tmp_path, out)


BYTE_LEVEL = {"decoder": {"type": "ByteLevel"}, "pre_tokenizer": {"type": "ByteLevel"}}


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"model": 3},
        {"model": {"vocab": {"a": 0}, "merges": [3]}, **BYTE_LEVEL},
        {"model": {"vocab": {"a": "b"}}, **BYTE_LEVEL},
        {"model": {"vocab": {"a": 0}}, **BYTE_LEVEL, "decoder": 3},
        {"model": {"vocab": {"a": 0}}, **BYTE_LEVEL, "normalizer": 3},
        {"model": {"vocab": {"a": 0}}, **BYTE_LEVEL, "added_tokens": [3]},
        {"model": {"vocab": {}}, **BYTE_LEVEL},
        "[" * 200_000,
    ],
)
def test_a_tokenizer_json_that_cannot_be(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
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
