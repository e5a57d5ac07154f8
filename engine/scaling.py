"""How a rotation is stretched over more positions than a model was trained for, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from engine.checks import at_least, at_most, greater_than, one_of
from engine.errors import ConfigError

ScalingType = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3", "xpos"]
YarnRamp = Literal["dimension", "rotations"]

MAX_CONTEXT = 2**31 - 1
"""Positions are integers of 32 bits."""

MAX_FACTOR = 2**31
MAX_TURNS = 1e6
MIN_TURNS = 1e-6
MAX_ATTENTION_FACTOR = 1e3
MIN_SCALE_BASE = 16
"""Less, and keys would grow more than a hundredfold from one end of a page to the other."""

# what each type of scaling may say, beside its type
SCALING_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_context"),
    "yarn": (
        "factor",
        "original_context",
        "beta_slow",
        "beta_fast",
        "truncate",
        "ramp",
        "attention_factor",
    ),
    "llama3": ("factor", "original_context", "low_freq_factor", "high_freq_factor"),
    "xpos": ("factor", "scale_base"),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How a model's rotation is stretched over more positions than it was trained for.

    type: the formula; engine/model/rope.py computes it and docs/rope.md explains it.
    factor: how many times the context grows, at least 1.
    original_context: the context before scaling, tokens; None: the model's max_position.
    yarn: frequencies that turn more than beta_fast times in the original context are kept, those
    that turn less than beta_slow times are divided by factor. ramp, between the two: `dimension` is
    linear in the index of the pair, as in the authors' code and in every published checkpoint, with
    bounds rounded outwards if truncate; `rotations` is linear in the number of turns, as in the
    paper. attention_factor multiplies queries and keys; None: 0.1 ln(factor) + 1.
    llama3: the same with high_freq_factor and low_freq_factor, `rotations`, no attention factor.
    xpos: scale_base, the distance in tokens over which a query shrinks by zeta; factor is linear.
    Raises ConfigError, also for an option that the type does not have.
    """

    type: ScalingType = "default"
    factor: float = 1.0
    original_context: int | None = None
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    truncate: bool = True
    ramp: YarnRamp = "dimension"
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    scale_base: float = 512.0

    def __post_init__(self) -> None:
        one_of("rope.type", self.type, get_args(ScalingType))
        for field in fields(self):
            if field.name != "type" and field.name not in SCALING_OPTIONS[self.type]:
                self._refuse_unless_default(field.name, field.default)
        greater_than("rope.factor", self.factor, 0)
        if self.factor < 1:
            raise ConfigError(f"rope.factor must be at least 1, got {self.factor}")
        # What `dynamic` becomes is its factor times a stretch, which is no more than a context.
        at_most("rope.factor", self.factor, MAX_FACTOR**2 if self.type == "ntk" else MAX_FACTOR)
        if self.original_context is not None:
            at_least("rope.original_context", self.original_context, 2)
            at_most("rope.original_context", self.original_context, MAX_CONTEXT)
        greater_than("rope.beta_slow", self.beta_slow, MIN_TURNS)
        greater_than("rope.beta_fast", self.beta_fast, self.beta_slow)
        at_most("rope.beta_fast", self.beta_fast, MAX_TURNS)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope.truncate must be true or false, got {self.truncate!r}")
        one_of("rope.ramp", self.ramp, get_args(YarnRamp))
        if self.attention_factor is not None:
            greater_than("rope.attention_factor", self.attention_factor, 0)
            at_most("rope.attention_factor", self.attention_factor, MAX_ATTENTION_FACTOR)
        greater_than("rope.low_freq_factor", self.low_freq_factor, MIN_TURNS)
        greater_than("rope.high_freq_factor", self.high_freq_factor, self.low_freq_factor)
        at_most("rope.high_freq_factor", self.high_freq_factor, MAX_TURNS)
        greater_than("rope.scale_base", self.scale_base, 0)
        if self.scale_base < MIN_SCALE_BASE:
            raise ConfigError(
                f"rope.scale_base must be at least {MIN_SCALE_BASE}, got {self.scale_base}"
            )

    def _refuse_unless_default(self, name: str, default: Any) -> None:
        if getattr(self, name) != default:
            raise ConfigError(_no_such_option(self.type, name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Build from JSON, such as {"type": "ntk", "factor": 4}.

        ConfigError as above, and where the factor of a type that is nothing without one is missing.
        """
        kind = values.get("type")
        if not isinstance(kind, str):
            raise ConfigError(
                f"rope.type must be one of {', '.join(SCALING_OPTIONS)}; got {kind!r}"
            )
        one_of("rope.type", kind, get_args(ScalingType))
        for name in values:
            if name != "type" and name not in SCALING_OPTIONS[kind]:
                raise ConfigError(_no_such_option(kind, name))
        if "factor" not in values and kind not in ("default", "xpos"):
            raise ConfigError(f"rope.factor is required for type {kind}")
        scaling = cls(**values)
        at_most("rope.factor", scaling.factor, MAX_FACTOR)
        return scaling

    def to_dict(self) -> dict[str, Any]:
        """The JSON that from_dict reads: the type and its own options."""
        return {name: getattr(self, name) for name in ("type", *SCALING_OPTIONS[self.type])}

    def check_model(self, rotary_dim: int, learned_frequencies: bool) -> None:
        """ConfigError, with the reason, if a model cannot be rotated like this."""
        if self.type in ("ntk", "dynamic", "yarn") and learned_frequencies:
            raise ConfigError(
                f"rope.type {self.type} changes the base that frequencies are powers of, and this "
                "model's were learned: they have none; linear and llama3 work on any frequencies"
            )
        if self.type in ("ntk", "dynamic") and rotary_dim < 4:
            raise ConfigError(
                f"rope.type {self.type} needs a rotary_dim of at least 4, got {rotary_dim}"
            )

    def in_force(self, num_tokens: int, trained_context: int) -> RopeScaling:
        """The fixed scaling that a sequence of num_tokens is computed with.

        `dynamic` becomes `ntk`: the length is rounded up to the original context times 2^k, and
        the base's factor is factor * 2^k - (factor - 1), Hugging Face's formula. Every other type
        is itself. So two lengths may share cached keys exactly where this gives equal values.
        """
        if self.type != "dynamic":
            return self
        original = self.original_context or trained_context
        stretch = self.steady_until(num_tokens, trained_context) // original
        if stretch == 1:
            return RopeScaling()
        return RopeScaling(type="ntk", factor=self.factor * stretch - (self.factor - 1))

    def steady_until(self, num_tokens: int, trained_context: int) -> int:
        """The greatest length that has the same scaling in force as num_tokens."""
        if self.type != "dynamic":
            return MAX_CONTEXT
        original = self.original_context or trained_context
        steps = -(-num_tokens // original)
        return original << max(steps - 1, 0).bit_length()

    def context(self, trained_context: int) -> int:
        """The longest sequence under this scaling, tokens."""
        original = self.original_context or trained_context
        return min(max(trained_context, int(original * self.factor)), MAX_CONTEXT)


def _no_such_option(kind: str, name: str) -> str:
    options = ", ".join(SCALING_OPTIONS[kind]) or "none"
    return f"rope.{name} is not an option of type {kind}; its options: {options}"


UNSCALED = RopeScaling()
"""The model's frequencies as they are."""
