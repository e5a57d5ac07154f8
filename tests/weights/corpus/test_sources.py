from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from weights.corpus.packages import Package
from weights.corpus.sources import (
    SOURCES,
    between_gutenberg_marks,
    join_lines,
    read_documents,
    tidy,
    write_documents,
)


def test_hard_wrapped_lines_are_joined_and_verse_is_not() -> None:
    text = "He went\r\nout to sea.\r\n\r\n   Ye ho,\r\n   my lads.\r\n\r\nAnd so on."
    assert join_lines(text) == "He went out to sea.\n\nYe ho,\nmy lads.\n\nAnd so on."


def test_typography_is_made_uniform() -> None:
    text = "\u201cNo\u201d\u2014he said -- \u2018why\u2019?  _Never_.\n\n\n\nEnd"
    assert tidy(text) == "\"No\"\u2014he said\u2014'why'? Never.\n\nEnd"


def test_licence_text_around_a_book_is_dropped() -> None:
    text = "Notes\n*** START OF THIS EBOOK ***\nThe book.\nEnd of Project Gutenberg's\nlicence"
    assert between_gutenberg_marks(text).strip() == "The book."


def test_documents_survive_their_file(tmp_path: Path) -> None:
    documents = ["a\n\nb \u2028 c", 'say "x"', "\u00e9"]
    write_documents(tmp_path / "train" / "x.jsonl", documents)
    assert read_documents(tmp_path / "train" / "x.jsonl") == documents


def test_a_package_that_cannot_be_fetched_says_what_to_do(tmp_path: Path) -> None:
    missing = Package("nothing 1.0", "nothing-1.0.tar.gz", ("false",))
    with pytest.raises(SystemExit, match=r"put nothing-1\.0\.tar\.gz into"):
        missing.fetch(tmp_path)


def test_a_package_that_is_there_is_not_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "there.tar.gz").touch()
    there = Package("there 1.0", "there.tar.gz", ("false",))
    assert there.fetch(tmp_path) == tmp_path / "there.tar.gz"


def test_every_source_names_its_licence() -> None:
    assert all(source.licence and source.package.name for source in SOURCES)
    assert len({source.name for source in SOURCES}) == len(SOURCES)


def test_the_command_has_its_name() -> None:
    command = [sys.executable, "-m", "weights.corpus", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("usage: python -m weights.corpus [-h] --out OUT")
