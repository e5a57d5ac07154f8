"""Settings refuse what cannot work, and say why."""

from __future__ import annotations

import math
import re

import pytest

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.scaling import SCALING_OPTIONS, RopeScaling


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "rope.type must be one of default, linear"),
        ({"type": "nkt"}, "got 'nkt'"),
        ({"type": 3}, "got 3"),
        ({"type": "ntk", "factor": 0.5}, "factor must be at least 1, got 0.5"),
        ({"type": "ntk", "factor": True}, "factor must be a number"),
        ({"type": "ntk", "factor": math.inf}, "factor must be finite"),
        ({"type": "ntk", "factor": math.nan}, "factor must be finite"),
        ({"type": "default", "factor": 1}, "not an option of type default; its options: none"),
        ({"type": "linear", "beta_fast": 32}, "beta_fast is not an option of type linear"),
        ({"type": "linear", "faktor": 2}, "faktor is not an option of type linear"),
        (
            {"type": "yarn", "factor": 2, "beta_fast": 1},
            "beta_fast must be greater than 1.0, got 1",
        ),
        (
            {"type": "yarn", "factor": 2, "ramp": "pairs"},
            "ramp must be one of dimension, rotations",
        ),
        ({"type": "yarn", "factor": 2, "truncate": 1}, "truncate must be true or false"),
        ({"type": "yarn", "factor": 2, "attention_factor": 0}, "attention_factor must be greater"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 4}, "high_freq_factor must be greater"),
        (
            {"type": "dynamic", "factor": 2, "original_context": 1},
            "original_context must be at least 2, got 1",
        ),
        (
            {"type": "yarn", "factor": 2, "beta_slow": 1e-320},
            "beta_slow must be greater than 1e-06, got 1e-320",
        ),
        ({"type": "xpos", "scale_base": 0}, "scale_base must be greater than 0, got 0"),
        ({"type": "xpos", "scale_base": 1e-300}, "scale_base must be at least 16, got 1e-300"),
        ({"type": "ntk"}, "rope.factor is required for type ntk"),
        ({"type": "linear", "factor": 1e300}, "factor must be at most 2147483648, got 1e+300"),
        ({"type": "dynamic", "factor": 1e300}, "factor must be at most"),
    ],
)
def test_scalings_refused(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        RopeScaling.from_dict(values)


def test_a_foreign_option_is_refused_by_the_constructor_too() -> None:
    with pytest.raises(ConfigError, match="scale_base is not an option of type ntk"):
        RopeScaling(type="ntk", factor=2, scale_base=100)


@pytest.mark.parametrize("kind", SCALING_OPTIONS)
def test_scalings_round_trip(kind: str) -> None:
    factor = {} if kind == "default" else {"factor": 4}
    scaling = RopeScaling.from_dict({"type": kind, **factor})
    assert RopeScaling.from_dict(scaling.to_dict()) == scaling
    assert hash(RopeScaling.from_dict(scaling.to_dict())) == hash(scaling)
    assert scaling.context(1024) == (1024 if kind == "default" else 4096)


@pytest.mark.parametrize(
    ("num_tokens", "stretch"),
    [(1, 1), (1024, 1), (1025, 2), (2048, 2), (2049, 4), (4096, 4), (4097, 8)],
)
@pytest.mark.parametrize("factor", [1.0, 2.0, 2.5])
def test_dynamic_follows_the_length(num_tokens: int, stretch: int, factor: float) -> None:
    """The scale is the length rounded up to 1024 * 2^k; emozilla's formula for the base."""
    scaling = RopeScaling(type="dynamic", factor=factor).in_force(num_tokens, 1024)
    length = 1024 * stretch
    assert length >= num_tokens
    expected = factor * length / 1024 - (factor - 1)
    if stretch == 1:
        assert scaling == RopeScaling()
    else:
        assert scaling == RopeScaling(type="ntk", factor=expected)


def test_only_dynamic_depends_on_the_length() -> None:
    scaling = RopeScaling(type="yarn", factor=4)
    assert scaling.in_force(5, 1024) is scaling.in_force(4000, 1024) is scaling


@pytest.mark.parametrize("kind", ["ntk", "dynamic", "yarn"])
def test_learned_frequencies_have_no_base(kind: str) -> None:
    scaling = RopeScaling.from_dict({"type": kind, "factor": 2})
    with pytest.raises(ConfigError, match=f"{kind} changes the base.*were learned"):
        scaling.check_model(64, learned_frequencies=True)
    scaling.check_model(64, learned_frequencies=False)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "xpos"])
def test_what_learned_frequencies_take(kind: str) -> None:
    factor = {} if kind == "default" else {"factor": 2}
    RopeScaling.from_dict({"type": kind, **factor}).check_model(64, learned_frequencies=True)


def test_ntk_needs_four_dimensions() -> None:
    with pytest.raises(ConfigError, match="rotary_dim of at least 4, got 2"):
        RopeScaling(type="ntk", factor=2).check_model(2, learned_frequencies=False)


def test_a_base_is_finite() -> None:
    sizes = dict.fromkeys(("vocab_size", "padded_vocab_size", "num_layers", "num_heads"), 1)
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "max_position", "rotary_dim"), 2)
    with pytest.raises(ConfigError, match="rope_base must be finite, got inf"):
        ModelConfig(**sizes, **wide, rope_base=math.inf)
