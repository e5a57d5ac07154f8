from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from weights.corpus.sources import write_documents
from weights.corpus.text import read_texts, size_of, split_documents


@given(st.lists(st.text(min_size=1), max_size=6), st.floats(0, 0.5, exclude_max=True))
def test_a_split_loses_nothing_and_keeps_about_its_share(texts: list[str], share: float) -> None:
    train, kept = split_documents(texts, share)
    assert "".join(train + kept) == "".join(texts)
    # at most twice its share (a paragraph's end may be that far), and a character of four bytes
    assert size_of(kept) <= 2 * share * size_of(texts) + 4


def test_a_document_is_parted_where_a_paragraph_ends() -> None:
    text = "\n\n".join(f"Paragraph {number} says a little." for number in range(100))
    (train,), (kept,) = split_documents([text], 0.1)
    assert kept.startswith("Paragraph 90")
    assert train.endswith("\n\n")


def test_subfolders_are_sources(tmp_path: Path) -> None:
    for name in ("a.txt", "plays/b.txt", "plays/old/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"\ufeffText of {name}.", encoding="utf-8")
    texts = read_texts(tmp_path, 0)
    assert texts.train == {
        tmp_path.name: ["Text of a.txt."],
        "plays": ["Text of plays/b.txt.", "Text of plays/old/c.txt."],
    }
    assert texts.held_out == {}
    alone = read_texts(tmp_path / "plays" / "b.txt", 0)
    assert alone.train == {"plays": ["Text of plays/b.txt."]}


def test_a_corpus_is_taken_as_it_was_parted(tmp_path: Path) -> None:
    write_documents(tmp_path / "train" / "novel.jsonl", ["One.", "Two."])
    write_documents(tmp_path / "heldout" / "other.jsonl", ["Three."])
    texts = read_texts(tmp_path, 0.3)
    assert (texts.train, texts.held_out) == ({"novel": ["One.", "Two."]}, {"other": ["Three."]})


def test_a_corpus_that_is_broken_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "train" / "novel.jsonl"
    write_documents(path, ["One."])
    for broken in (b"{}\n", b"'Two.'\n", b'"\xff"\n'):
        path.write_bytes(b'"One."\n' + broken)
        with pytest.raises(ConfigError, match=r"novel.jsonl, line \d: expected a JSON string"):
            read_texts(tmp_path, 0.1)


def test_a_share_of_less_than_a_character_keeps_nothing() -> None:
    text = "\u6587" * 40
    assert split_documents([text], 0.01) == ([text], [])


def test_no_text_and_no_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"holds no text: expected .txt files"):
        read_texts(tmp_path, 0.1)
    with pytest.raises(ConfigError, match="absent: no such file or folder"):
        read_texts(tmp_path / "absent", 0.1)
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.txt cannot be read as UTF-8"):
        read_texts(tmp_path, 0.1)
