"""What /docs says about ranges is what SamplingParams enforces."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.params import RequestOptions, SamplingParams
from engine.scaling import UNSCALED, RopeScaling
from server.schemas import GenerateRequest

SCHEMA = GenerateRequest.model_json_schema()["properties"]
OPTIONS = [*RequestOptions.__struct_fields__]
GRAMMARS = {"response_format", "regex", "choice"}
PARAMS = [name for name in SamplingParams.__struct_fields__ if name != "grammar"]
FIELDS = [*PARAMS, *OPTIONS]


def test_the_body_has_every_field_and_default() -> None:
    assert set(SCHEMA) == {"prompt", "stream", "echo", "n", *GRAMMARS, *FIELDS}
    assert GenerateRequest(prompt="a").to_params() == SamplingParams()
    assert GenerateRequest(prompt="a").to_options() == RequestOptions()
    nulls = {"stop": None, "seed": None, "max_tokens": None, "logprobs": None}
    assert GenerateRequest(prompt="a", **nulls).to_params() == SamplingParams()
    assert all(SCHEMA[name].get("description") for name in SCHEMA)


def test_a_rope_has_every_option_and_default() -> None:
    (rope,) = [each["$ref"] for each in SCHEMA["rope"]["anyOf"] if "$ref" in each]
    options = GenerateRequest.model_json_schema()["$defs"][rope.rpartition("/")[2]]["properties"]
    assert set(options) == {each.name for each in fields(RopeScaling)}
    for name, option in options.items():
        assert option["description"]
        assert name == "type" or option["default"] == getattr(UNSCALED, name)


@pytest.mark.parametrize("name", [name for name in FIELDS if "maximum" in SCHEMA[name]])
def test_documented_bounds_are_the_enforced_ones(name: str) -> None:
    schema: dict[str, Any] = SCHEMA[name]
    inside, beyond = [schema["maximum"]], [schema["maximum"] + 1]
    if "minimum" in schema:
        inside.append(schema["minimum"])
        beyond.append(schema["minimum"] - 1)
    else:
        beyond.append(schema["exclusiveMinimum"])
        inside.append(schema["exclusiveMinimum"] + 1e-9)
    kind = RequestOptions if name in OPTIONS else SamplingParams
    for value in inside:
        kind(**{name: value})
    for value in beyond:
        with pytest.raises(InvalidRequest, match=name):
            kind(**{name: value})


def test_numeric_fields_document_their_bounds() -> None:
    free = {"stop", "stop_token_ids", "ignore_eos", "overflow", "logit_bias", "cache_salt", "rope"}
    assert {name for name in FIELDS if "maximum" not in SCHEMA[name]} == free
