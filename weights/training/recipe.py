"""What decides a training run, as a TOML file may say it: text, vocabulary, network, optimisation.

    [data]        held_out = 0.01             share of each source kept from training, its end
                  [data.weights]              share of the tokens seen, by source; default: by size
    [tokenizer]   vocab_size = 8192           end of text included; default: 8192, or what a small
                                              text gives
    [model]       num_layers = 6 ...          settings of config.json, but the vocabulary's
    [training]    batch_tokens = 6144 ...     the fields of Recipe

What a file leaves out is as for the default model, whose own file is weights/default.toml.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from engine.config import ModelConfig
from engine.errors import ConfigError

OptimizerKind = Literal["muon", "adamw"]
ScheduleKind = Literal["stay", "cosine"]
MODEL: Mapping[str, Any] = MappingProxyType(
    {
        "num_layers": 6,
        "num_heads": 5,
        "hidden_size": 320,
        "intermediate_size": 1280,
        "max_position": 1024,
        "rotary_dim": 32,
        "activation": "gelu_tanh",
    }
)
"""The shape of the default model: 10.0 million parameters with its vocabulary."""

OF_THE_VOCABULARY = ("vocab_size", "padded_vocab_size", "eos_token_id")
AS_TRAINED: Mapping[str, Any] = MappingProxyType(
    {
        "pairing": "half",
        "rope_sign": 1,
        "rope": {"type": "default"},
        "learned_frequencies": "none",
        "head_bias": False,
    }
)
"""Settings of config.json that training knows one value of: with another, what is served would not
be what was trained."""

VOCAB_SIZE = 8192
MOST_IDS = 2**16  # token files are uint16
MOST_SEED = 2**63 - 1
MAY_CHANGE = ("steps", "minutes", "evaluate_every", "save_seconds")
"""Fields of Recipe that a run which is resumed may have otherwise: no step depends on them."""


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _number(name: str, value: object, low: float, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < high:
        limit = f"in [{low:g}, {high:g})" if high < math.inf else f"at least {low:g}"
        raise ConfigError(f"{name} must be a number {limit}, got {value!r}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes, beside text and network.

    batch_tokens: tokens of a step, over all devices.
    length, long_length: tokens of a window; the long ones come when the learning rate, decaying,
    has fallen below long_below of its peak. 0 is the network's context, or a quarter of it.
    optimizer: `muon` (with AdamW for what is no matrix) or `adamw` for everything.
    schedule: `stay` warms up, stays, and falls to 0 in the last decay_share of the run, so that
    its end may be moved at any time; `cosine` falls from the warm-up on, and needs steps.
    steps: how many in all; minutes: the same in busy minutes (processor time over threads, or on a
    GPU the clock). Whichever comes first.
    clip: largest norm of the gradients. evaluate_every: steps between held-out measurements.
    save_seconds: between checkpoints.
    """

    batch_tokens: int = 6144
    length: int = 0
    long_length: int = 0
    long_below: float = 0.25
    optimizer: OptimizerKind = "muon"
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    schedule: ScheduleKind = "stay"
    warmup: int = 100
    decay_share: float = 0.2
    steps: int | None = None
    minutes: float | None = None
    clip: float = 1.0
    seed: int = 1
    evaluate_every: int = 200
    save_seconds: float = 180

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "warmup", "evaluate_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("length", "long_length", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.seed > MOST_SEED:
            raise ConfigError(f"seed must be at most {MOST_SEED}, got {self.seed}")
        for name in ("learning_rate", "clip", "save_seconds", "weight_decay"):
            _number(name, getattr(self, name), 0)
        for name in ("decay_share", "long_below"):
            _number(name, getattr(self, name), 0, 1)
        for name, kind in (("optimizer", OptimizerKind), ("schedule", ScheduleKind)):
            if getattr(self, name) not in (known := get_args(kind)):
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}"
                )
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        if self.minutes is not None:
            _number("minutes", self.minutes, 0)
        if self.steps is None and self.minutes is None:
            raise ConfigError("say how long to train: steps or minutes (or both)")
        if self.schedule == "cosine":
            self._check_cosine()

    def _check_cosine(self) -> None:
        if self.steps is None:
            raise ConfigError("schedule cosine needs steps: it falls towards a known end")
        if self.minutes is not None:
            raise ConfigError(
                f"minutes must be left out with schedule cosine, which ends by steps; "
                f"got {self.minutes}"
            )
        if self.warmup >= self.steps:
            raise ConfigError(
                f"warmup must be less than steps ({self.steps}) with schedule cosine, "
                f"got {self.warmup}"
            )

    @property
    def decay_steps_per_step(self) -> float:
        """Steps of decay for each step before it, so that decay is decay_share of the whole."""
        return self.decay_share / (1 - self.decay_share)

    def windows(self, max_position: int) -> tuple[int, int]:
        """length and long_length in tokens. Raises ConfigError where a context cannot hold them."""
        length = self.length or max(1, max_position // 4)
        long_length = self.long_length or max_position
        for name, value in (("length", length), ("long_length", long_length)):
            if value > max_position:
                raise ConfigError(
                    f"{name} must be at most max_position ({max_position}), got {value}"
                )
            if value > self.batch_tokens:
                raise ConfigError(
                    f"batch_tokens must hold one window at least ({name} is {value}), "
                    f"got {self.batch_tokens}"
                )
            if over := self.batch_tokens % value:
                raise ConfigError(
                    f"batch_tokens must be a multiple of {name} ({value}), got "
                    f"{self.batch_tokens}. Next: {self.batch_tokens - over}"
                )
        return length, long_length


@dataclass(frozen=True)
class TrainingConfig:
    """A whole training file. model: settings of ModelConfig, but the vocabulary's.

    vocab_size: None is VOCAB_SIZE, or fewer where the text gives fewer, or a tokenizer's that lies
    in the model directory.
    """

    recipe: Recipe
    model: Mapping[str, Any] = field(default_factory=lambda: MODEL)
    vocab_size: int | None = None
    held_out: float = 0.01
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # 256 bytes, one merge, the end of text
        if self.vocab_size is not None:
            _whole("tokenizer.vocab_size", self.vocab_size, 258)
            if self.vocab_size > MOST_IDS:
                raise ConfigError(
                    f"tokenizer.vocab_size must be at most {MOST_IDS}, got {self.vocab_size}"
                )
        _number("data.held_out", self.held_out, 0, 0.5)
        for name, value in (("model", self.model), ("data.weights", self.weights)):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} must be a table, got {value!r}")
        for name, weight in self.weights.items():
            _number(f"data.weights.{name}", weight, 0)
        if self.weights and not any(self.weights.values()):
            raise ConfigError("data.weights must not all be 0")
        vocab_size = self.vocab_size or VOCAB_SIZE
        network = self.model_config(vocab_size, vocab_size - 1)
        self.recipe.windows(network.max_position)

    def model_config(self, vocab_size: int, end_of_text: int) -> ModelConfig:
        """The network over a vocabulary. Raises ConfigError."""
        if named := sorted(self.model.keys() & set(OF_THE_VOCABULARY)):
            raise ConfigError(f"model.{named[0]} follows from the tokenizer: leave it out")
        for name, value in AS_TRAINED.items():
            if (given := self.model.get(name, value)) != value:
                raise ConfigError(
                    f"model.{name} must be {value!r}, which is what is trained; got {given!r}"
                )
        return ModelConfig.from_dict(
            {
                **self.model,
                "vocab_size": vocab_size,
                "padded_vocab_size": vocab_size,
                "eos_token_id": end_of_text,
            }
        )

    @classmethod
    def read(cls, path: Path | None, changes: Mapping[str, Any] | None = None) -> TrainingConfig:
        """A TOML file, or the defaults. changes: fields of Recipe that win over the file's.

        Raises ConfigError for a file that cannot be read and for what it says that cannot be.
        """
        tables = {} if path is None else _read_toml(path)
        if unknown := sorted(tables.keys() - {"training", "data", "tokenizer", "model"}):
            raise ConfigError(
                f"{path}: unknown table [{unknown[0]}]; known: data, model, tokenizer, training"
            )
        return cls.from_tables(tables, changes or {})

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], changes: Mapping[str, Any]) -> TrainingConfig:
        """What a TOML file says, by table, and fields of Recipe that win. Raises ConfigError."""
        values = _table(tables, "training", {each.name for each in fields(Recipe)})
        data = _table(tables, "data", {"held_out", "weights"})
        tokenizer = _table(tables, "tokenizer", {"vocab_size"})
        model = _table(tables, "model", {each.name for each in fields(ModelConfig)})
        return cls(
            recipe=Recipe(**{**values, **changes}),
            model={**MODEL, **model},
            **tokenizer,
            **data,
        )

    def to_tables(self) -> dict[str, Any]:
        """What from_tables reads."""
        return {
            "data": {"held_out": self.held_out, "weights": dict(self.weights)},
            "tokenizer": {} if self.vocab_size is None else {"vocab_size": self.vocab_size},
            "model": dict(self.model),
            "training": {name: v for name, v in asdict(self.recipe).items() if v is not None},
        }

    def check_resumes(self, before: TrainingConfig) -> None:
        """Raises ConfigError where a run that began as `before` would go on as another one."""
        now, then = self.to_tables(), before.to_tables()
        for table, values in now.items():
            for name in sorted(values.keys() | then[table].keys()):
                old, new = then[table].get(name), values.get(name)
                if old != new and not (table == "training" and name in MAY_CHANGE):
                    raise ConfigError(
                        f"{table}.{name} was {old!r} when this run began, and {new!r} is asked "
                        "for: go on as it began, or train in another directory"
                    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _table(tables: Mapping[str, Any], name: str, known: set[str]) -> dict[str, Any]:
    values = tables.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a table, got {values!r}")
    if unknown := sorted(values.keys() - known):
        raise ConfigError(f"unknown setting {name}.{unknown[0]}; known: {', '.join(sorted(known))}")
    return values
