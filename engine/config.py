"""Frozen settings, checked when they are made. Nothing here reads the environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from engine.errors import ConfigError

Pairing = Literal["half", "interleaved"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2"]
Norm = Literal["layernorm", "rmsnorm"]
QKNorm = Literal["none", "before", "after"]
ScalingType = Literal["default", "linear", "ntk", "dynamic", "yarn", "llama3", "xpos"]
YarnRamp = Literal["dimension", "rotations"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["none", "int8"]

SWITCHES = (
    "parallel_residual",
    "norm_weight",
    "qk_norm_weight",
    "bias",
    "head_bias",
    "tie_embeddings",
)
"""Settings of a model that are true or false."""


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, got {value}")


def _greater_than(name: str, value: float, bound: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    if not value > bound:
        raise ConfigError(f"{name} must be greater than {bound}, got {value}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A RoPE GPT-2, with everything that the shapes of its tensors cannot tell.

    The network is GPT-2's: one attention and one MLP per layer, each on a normalised copy.

    vocab_size: ids that a token has; padded_vocab_size: rows of the embedding (>= vocab_size).
    max_position: trained context, in tokens.
    rotary_dim: how many of head_dim's dimensions are rotated (even; the first ones).
    rope_base: inv_freq_i = rope_base^(-2i / rotary_dim)  (Su et al. 2021, arXiv 2104.09864, 3.2.2).
    pairing: which dimensions of a stored checkpoint rotate together: in `half`
    (i, i + rotary_dim / 2), in `interleaved` (2i, 2i + 1). Inside the engine there is only `half`.
    rope_sign: 1, or -1 where a stored checkpoint was rotated by minus the angle; inside only 1.
    parallel_residual: the MLP reads the layer's input, not what attention made of it.
    activation: `gelu_tanh` is GPT-2's approximation, `relu2` the square of relu.
    norm_weight: whether norms have weights.
    qk_norm: an RMS norm of each head's query and key, `before` or `after` the rotation;
    qk_norm_weight: whether it has weights, which only make sense before.
    bias: whether products and norms have biases, unless attention_bias, mlp_bias or norm_bias says
    otherwise (null does not); an RMS norm has none. head_bias: whether the last product has one.
    """

    vocab_size: int
    padded_vocab_size: int
    num_layers: int
    num_heads: int
    hidden_size: int
    intermediate_size: int
    max_position: int
    rotary_dim: int
    rope_base: float = 10_000.0
    pairing: Pairing = "half"
    rope_sign: int = 1
    parallel_residual: bool = False
    activation: Activation = "gelu"
    norm: Norm = "layernorm"
    norm_weight: bool = True
    norm_eps: float = 1e-5
    qk_norm: QKNorm = "none"
    qk_norm_weight: bool = False
    bias: bool = True
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_bias: bool | None = None
    head_bias: bool = False
    tie_embeddings: bool = True
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "num_heads", "hidden_size", "intermediate_size"):
            _at_least(name, getattr(self, name), 1)
        _at_least("padded_vocab_size", self.padded_vocab_size, self.vocab_size)
        _at_least("max_position", self.max_position, 2)
        _at_least("rotary_dim", self.rotary_dim, 2)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads ({self.num_heads}), "
                f"got {self.hidden_size}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"rotary_dim must be even and at most head_dim ({self.head_dim}), "
                f"got {self.rotary_dim}"
            )
        _greater_than("rope_base", self.rope_base, 1)
        _greater_than("norm_eps", self.norm_eps, 0)
        _one_of("pairing", self.pairing, get_args(Pairing))
        _one_of("activation", self.activation, get_args(Activation))
        _one_of("norm", self.norm, get_args(Norm))
        _one_of("qk_norm", self.qk_norm, get_args(QKNorm))
        if isinstance(self.rope_sign, bool) or self.rope_sign not in (1, -1):
            raise ConfigError(f"rope_sign must be 1 or -1, got {self.rope_sign!r}")
        self._check_switches()
        if self.eos_token_id is not None:
            _at_least("eos_token_id", self.eos_token_id, 0)
        if self.eos_token_id is not None and self.eos_token_id >= self.vocab_size:
            raise ConfigError(
                f"eos_token_id must be below vocab_size ({self.vocab_size}), "
                f"got {self.eos_token_id}"
            )

    def _check_switches(self) -> None:
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("attention_bias", "mlp_bias", "norm_bias"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(
                    f"{name} must be true, false or null, got {getattr(self, name)!r}"
                )
        if self.norm_bias and not self.has_norm_bias:
            raise ConfigError(
                "norm_bias must not be true: only a layernorm with weights has biases"
            )
        if self.qk_norm_weight and self.qk_norm != "before":
            raise ConfigError(
                f"qk_norm_weight must be false with qk_norm {self.qk_norm!r}: weights after the "
                "rotation treat the dimensions of a pair differently, so that scores no longer "
                "depend on the distance alone"
            )

    @property
    def has_attention_bias(self) -> bool:
        """Whether both products of attention have biases."""
        return self.bias if self.attention_bias is None else self.attention_bias

    @property
    def has_mlp_bias(self) -> bool:
        """Whether both products of the MLP have biases."""
        return self.bias if self.mlp_bias is None else self.mlp_bias

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have biases."""
        wanted = self.bias if self.norm_bias is None else self.norm_bias
        return wanted and self.norm == "layernorm" and self.norm_weight

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build from a config.json; an unknown or missing key is a ConfigError."""
        known = {f.name for f in fields(cls)}
        optional = {f.name for f in fields(cls) if f.default is not MISSING}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(
                f"unknown model settings: {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        if missing := sorted(known - optional - values.keys()):
            raise ConfigError(f"missing model settings: {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        return asdict(self)


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
        _one_of("rope.type", self.type, get_args(ScalingType))
        for field in fields(self):
            if field.name != "type" and field.name not in SCALING_OPTIONS[self.type]:
                self._refuse_unless_default(field.name, field.default)
        _greater_than("rope.factor", self.factor, 0)
        if self.factor < 1:
            raise ConfigError(f"rope.factor must be at least 1, got {self.factor}")
        if self.original_context is not None:
            _at_least("rope.original_context", self.original_context, 2)
        _greater_than("rope.beta_slow", self.beta_slow, 0)
        _greater_than("rope.beta_fast", self.beta_fast, self.beta_slow)
        if not isinstance(self.truncate, bool):
            raise ConfigError(f"rope.truncate must be true or false, got {self.truncate!r}")
        _one_of("rope.ramp", self.ramp, get_args(YarnRamp))
        if self.attention_factor is not None:
            _greater_than("rope.attention_factor", self.attention_factor, 0)
        _greater_than("rope.low_freq_factor", self.low_freq_factor, 0)
        _greater_than("rope.high_freq_factor", self.high_freq_factor, self.low_freq_factor)
        _greater_than("rope.scale_base", self.scale_base, 0)

    def _refuse_unless_default(self, name: str, default: Any) -> None:
        if getattr(self, name) != default:
            raise ConfigError(_no_such_option(self.type, name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Build from JSON, such as {"type": "ntk", "factor": 4}; ConfigError as above."""
        kind = values.get("type")
        if not isinstance(kind, str):
            raise ConfigError(
                f"rope.type must be one of {', '.join(SCALING_OPTIONS)}; got {kind!r}"
            )
        _one_of("rope.type", kind, get_args(ScalingType))
        for name in values:
            if name != "type" and name not in SCALING_OPTIONS[kind]:
                raise ConfigError(_no_such_option(kind, name))
        return cls(**values)

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
        steps = -(-num_tokens // original)
        stretch = 1 << max(steps - 1, 0).bit_length()
        if stretch == 1:
            return RopeScaling()
        return RopeScaling(type="ntk", factor=self.factor * stretch - (self.factor - 1))

    def context(self, trained_context: int) -> int:
        """The longest sequence under this scaling, tokens."""
        original = self.original_context or trained_context
        return max(trained_context, int(original * self.factor))


def _no_such_option(kind: str, name: str) -> str:
    options = ", ".join(SCALING_OPTIONS[kind]) or "none"
    return f"rope.{name} is not an option of type {kind}; its options: {options}"


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The pages. kv_memory: bytes for keys and values; None: enough for max_num_seqs contexts, but
    at most half of the memory that is free."""

    block_size: int = 64
    kv_memory: int | None = None

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32, 64):
            raise ConfigError(f"block_size must be 16, 32 or 64, got {self.block_size}")
        if self.kv_memory is not None:
            _at_least("kv_memory", self.kv_memory, 1)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The step: max_num_seqs requests run at once, max_num_batched_tokens tokens are computed.

    priority_seconds: a request starts as if it had come so much earlier for each point of its
    priority. So it goes before others, but only for a time, and nothing waits for ever.
    max_preemptions: a request that was put back so often runs to its end the next time.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    priority_seconds: float = 10.0
    max_preemptions: int = 3

    def __post_init__(self) -> None:
        _at_least("max_num_seqs", self.max_num_seqs, 1)
        _at_least("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs)
        _greater_than("priority_seconds", self.priority_seconds, 0)
        _at_least("max_preemptions", self.max_preemptions, 0)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that an engine is made from.

    model_dir: a model directory; threads: CPU threads of the engine, None: one per core;
    quantize: what products compute with instead of dtype; int8: weights with a scale per output,
    rows with a scale each, exact sums (on a CPU only);
    num_token_ids: one more than the tokenizer's highest id, None: not known; unused_token_ids: ids
    below it that the tokenizer does not have. What the tokenizer does not have is never sampled.
    """

    model_dir: str
    device: Device = "auto"
    dtype: DType = "auto"
    quantize: Quantize = "none"
    threads: int | None = None
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    num_token_ids: int | None = None
    unused_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _one_of("device", self.device, get_args(Device))
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("quantize", self.quantize, get_args(Quantize))
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
