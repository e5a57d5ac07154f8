"""Frozen settings, checked when they are made. Nothing here reads the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

from engine.checks import at_least, greater_than, one_of
from engine.errors import ConfigError
from engine.scaling import UNSCALED, RopeScaling

Pairing = Literal["half", "interleaved"]
Activation = Literal["gelu", "gelu_tanh", "relu", "relu2"]
Norm = Literal["layernorm", "rmsnorm"]
QKNorm = Literal["none", "before", "after"]
LearnedFrequencies = Literal["none", "shared", "per_layer"]
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


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A RoPE GPT-2, with everything that the shapes of its tensors cannot tell.

    The network is GPT-2's: one attention and one MLP per layer, each on a normalised copy.

    vocab_size: ids that a token has; padded_vocab_size: rows of the embedding (>= vocab_size).
    max_position: trained context, in tokens.
    rotary_dim: how many of head_dim's dimensions are rotated (even; the first ones).
    rope_base: inv_freq_i = rope_base^(-2i / rotary_dim)  (Su et al. 2021, arXiv 2104.09864, 3.2.2).
    learned_frequencies: they are a tensor, `inv_freq`, [rotary_dim / 2] radians per token where
    `shared` by all layers, [num_layers, rotary_dim / 2] where `per_layer`; rope_base is not used.
    rope: a scaling that the model is served with, unless a request names another; as JSON, such as
    {"type": "yarn", "factor": 4}.
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
    learned_frequencies: LearnedFrequencies = "none"
    rope: RopeScaling = UNSCALED
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
            at_least(name, getattr(self, name), 1)
        at_least("padded_vocab_size", self.padded_vocab_size, self.vocab_size)
        at_least("max_position", self.max_position, 2)
        at_least("rotary_dim", self.rotary_dim, 2)
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
        greater_than("rope_base", self.rope_base, 1)
        greater_than("norm_eps", self.norm_eps, 0)
        one_of("pairing", self.pairing, get_args(Pairing))
        one_of("learned_frequencies", self.learned_frequencies, get_args(LearnedFrequencies))
        self.rope.check_model(self.rotary_dim, self.learned_frequencies != "none")
        one_of("activation", self.activation, get_args(Activation))
        one_of("norm", self.norm, get_args(Norm))
        one_of("qk_norm", self.qk_norm, get_args(QKNorm))
        if isinstance(self.rope_sign, bool) or self.rope_sign not in (1, -1):
            raise ConfigError(f"rope_sign must be 1 or -1, got {self.rope_sign!r}")
        self._check_switches()
        if self.eos_token_id is not None:
            at_least("eos_token_id", self.eos_token_id, 0)
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
        rope = values.get("rope", UNSCALED)
        if isinstance(rope, Mapping):
            rope = RopeScaling.from_dict(rope)
        if not isinstance(rope, RopeScaling):
            raise ConfigError(f"rope must be an object, got {rope!r}")
        return cls(**{**values, "rope": rope})

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        return asdict(self) | {"rope": self.rope.to_dict()}


@dataclass(frozen=True, kw_only=True)
class SharedPrefix:
    """A beginning of prompts, such as an operator's system prompt. name: what errors call it."""

    name: str
    token_ids: tuple[int, ...]

    def check(self, block_size: int, context: int, vocab_size: int) -> None:
        """Raises ConfigError where it could never be of use."""
        count = len(self.token_ids)
        if count < block_size:
            raise ConfigError(
                f"shared prefix {self.name} must have at least one page of {block_size} tokens "
                f"(block_size), since only whole pages are shared; got {count} tokens"
            )
        if count > context:
            raise ConfigError(
                f"shared prefix {self.name} must fit the context of {context} tokens, got {count}"
            )
        if wrong := [each for each in self.token_ids if not 0 <= each < vocab_size]:
            raise ConfigError(
                f"shared prefix {self.name} must hold token ids from 0 to {vocab_size - 1}, "
                f"got {wrong[0]}"
            )


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The pages. kv_memory: bytes for keys and values; None: enough for max_num_seqs contexts, but
    at most half of the memory that is free. shared_prefixes: beginnings of prompts whose whole
    pages all requests share, whatever their cache_salt."""

    block_size: int = 64
    kv_memory: int | None = None
    shared_prefixes: tuple[SharedPrefix, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32, 64):
            raise ConfigError(f"block_size must be 16, 32 or 64, got {self.block_size}")
        if self.kv_memory is not None:
            at_least("kv_memory", self.kv_memory, 1)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The step: max_num_seqs requests run at once, max_num_batched_tokens tokens are computed.

    priority_seconds: a request starts as if it had come so much earlier for each point of its
    priority. So it goes before others, but only for a time, and nothing waits for ever.
    max_preemptions: a request that was put back so often runs to its end the next time.
    max_profiles: rotation profiles in force at once, the model's own among them; a request with
    another one waits.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    priority_seconds: float = 10.0
    max_preemptions: int = 3
    max_profiles: int = 8

    def __post_init__(self) -> None:
        at_least("max_num_seqs", self.max_num_seqs, 1)
        at_least("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs)
        greater_than("priority_seconds", self.priority_seconds, 0)
        at_least("max_preemptions", self.max_preemptions, 0)
        at_least("max_profiles", self.max_profiles, 1)


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
        one_of("device", self.device, get_args(Device))
        one_of("dtype", self.dtype, get_args(DType))
        one_of("quantize", self.quantize, get_args(Quantize))
        if self.threads is not None:
            at_least("threads", self.threads, 1)
