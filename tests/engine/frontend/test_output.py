"""Text is never cut inside a character, and never says anything of a stop string."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frontend.output import Detokenizer, OutputProcessor, StopStrings
from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineOutput
from engine.params import SamplingParams
from engine.request import FinishReason
from tests.models import EOS


def cut(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at the places."""
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_model_dir)


@given(data=st.binary(max_size=40))
def test_pieces_join_to_the_decoded_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(byte) for byte in data] + [detokenizer.flush()]
    assert "".join(pieces) == data.decode("utf-8", "replace")


@given(text=st.text(max_size=30))
def test_no_replacement_character_that_the_text_does_not_have(
    tokenizer: Tokenizer, text: str
) -> None:
    detokenizer = Detokenizer(tokenizer)
    for byte in text.encode():
        assert ("\ufffd" in detokenizer.push(byte)) <= ("\ufffd" in text)
    assert detokenizer.flush() == ""


@given(
    text=st.text("abc", max_size=40),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    places=st.lists(st.integers(0, 100), max_size=20),
)
def test_stop_strings_do_not_depend_on_the_pieces(
    text: str, stop: list[str], places: list[int]
) -> None:
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    expected = text[: min(ends)[1]] if ends else text

    stops = StopStrings(stop)
    shown = ""
    for piece in cut(text, places):
        shown += stops.push(piece)
        assert expected.startswith(shown)  # nothing is ever shown that must be taken back
        if stops.found is not None:
            break
    else:
        shown += stops.flush()
    assert shown == expected
    assert (stops.found is not None) == bool(ends)


def test_text_waits_no_longer_than_it_must() -> None:
    stops = StopStrings(["\n\nEND"])
    assert stops.push("one\n") == "one"
    assert stops.push("two") == "\ntwo"


def outputs(tokenizer: Tokenizer, data: bytes, last: FinishReason | None) -> list[EngineOutput]:
    reasons = [None] * (len(data) - 1) + [last]
    return [
        EngineOutput("r", index, byte, reason)
        for index, (byte, reason) in enumerate(zip(data, reasons, strict=True))
    ]


def test_unfinished_character_at_the_end(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams(), frozenset())
    deltas = [processor.process(o) for o in outputs(tokenizer, b"a\xe2\x82", FinishReason.LENGTH)]
    assert [delta.text for delta in deltas] == ["a", "", "\ufffd"]
    assert processor.finish_reason is FinishReason.LENGTH


def test_held_text_is_shown_when_the_output_ends(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams(stop=("abc",)), frozenset())
    deltas = [processor.process(o) for o in outputs(tokenizer, b"xab", FinishReason.LENGTH)]
    assert [delta.text for delta in deltas] == ["x", "", "ab"]


def test_stop_string_over_tokens(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams(stop=("bc",)), frozenset())
    deltas = [processor.process(o) for o in outputs(tokenizer, b"abc", None)]
    assert "".join(delta.text for delta in deltas) == "a"
    assert processor.finish_reason is FinishReason.STOP


def test_text_of_an_end_token_is_not_shown(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams(), frozenset({ord("!"), EOS}))
    deltas = [processor.process(o) for o in outputs(tokenizer, b"a!", FinishReason.STOP)]
    assert [delta.text for delta in deltas] == ["a", ""]
    assert processor.num_tokens == 2


def test_last_token_at_the_limit_is_shown_even_if_it_could_stop(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer, SamplingParams(), frozenset({ord("!")}))
    (delta,) = [processor.process(o) for o in outputs(tokenizer, b"a", FinishReason.LENGTH)]
    assert delta.text == "a"
