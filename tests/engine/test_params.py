"""SamplingParams are checked when they are made."""

from __future__ import annotations

import math

import pytest

from engine.errors import InvalidRequest
from engine.params import Grammar, SamplingParams


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature must be at least 0.0 and at most 100.0, got -0.1"),
        ("temperature", math.nan, "got nan"),
        ("temperature", math.inf, "got inf"),
        ("top_k", -1, "top_k must be at least 0 and at most 2147483647, got -1"),
        ("top_p", 0.0, "top_p must be greater than 0.0 and at most 1.0, got 0.0"),
        ("top_p", 1.1, "got 1.1"),
        ("min_p", -0.5, "min_p"),
        ("repetition_penalty", 0.0, "at least 0.01 and at most 100.0, got 0.0"),
        ("presence_penalty", 1000.0, "at most 100.0"),
        ("frequency_penalty", -1000.0, "at least -100.0"),
        ("seed", -1, "seed must be at least 0"),
        ("seed", 2**64, "at most 18446744073709551615"),
        ("max_tokens", 0, "max_tokens must be at least 1 and at most 2147483647, got 0"),
        ("logprobs", 21, "logprobs must be at least 0 and at most 20, got 21"),
        ("stop", ("",), "empty string"),
        ("stop", ("x",) * 17, "at most 16 strings, got 17"),
        ("stop_token_ids", (-1,), "stop_token_ids must be at least 0"),
        ("temperature", "hot", "temperature must be a number, got 'hot'"),
        ("top_p", None, "top_p must be a number, got None"),
        ("top_k", 1.5, "top_k must be an integer, got 1.5"),
        ("max_tokens", True, "max_tokens must be an integer, got True"),
        ("temperature", 1e-46, "temperature must be 0 .greedy. or at least 1e-06, got 1e-46"),
        ("stop_token_ids", ("x",), "stop_token_ids must hold integers, got 'x'"),
        ("stop_token_ids", (1.5,), "must hold integers"),
        ("stop_token_ids", None, "stop_token_ids must be a list, got None"),
        ("stop", None, "stop must be a list of strings, got None"),
        ("top_k", None, "top_k must be an integer, got None"),
        ("stop", (3,), "stop must hold strings, got 3"),
        ("ignore_eos", "no", "ignore_eos must be true or false, got 'no'"),
        ("grammar", "[a-z]", "grammar must be a Grammar, got '.a-z.'"),
    ],
)
def test_out_of_range(field: str, value: object, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        SamplingParams(**{field: value})  # type: ignore[arg-type]  # the values are wrong on purpose
    assert caught.value.field == field


def test_the_length_of_a_grammar() -> None:
    long = Grammar("json_schema", " " * 65_537)
    with pytest.raises(InvalidRequest, match="at most 65536 characters, got 65537") as caught:
        SamplingParams(grammar=long)
    assert caught.value.field == "response_format"  # as the request calls it


def test_one_stop_string_may_stand_alone() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]  # as people write it
