"""What a checkpoint says of itself: its format, its settings, and what it leaves open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from typing import Any, get_args

import torch

from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.gpt2 import GPT2
from engine.model.loader import FLOAT_TYPES
from weights.files import SETTINGS_FILES
from weights.formats.recognition import recognise
from weights.formats.rotation import from_frequencies, learned
from weights.formats.table import ROPE_FIELDS, Format, Layout, Setting
from weights.source import Source, StoredTensor

LEARNED = "learned_frequencies"
FREQUENCIES = "inv_freq"
LAYOUT = "qkv_layout"
"""The one declaration that is no field of ModelConfig."""


@dataclass
class Description:
    """known: settings by field of ModelConfig, and qkv_layout; why: where each was found.

    parts: tensor of ours -> the stored tensors that make it; opened: fields that nothing says.
    """

    source: Source
    format: Format
    parts: dict[str, list[StoredTensor]]
    num_layers: int
    known: dict[str, Any] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, value: Any, why: str) -> None:
        """Write a setting down, unless it is known."""
        if value is not None and name not in self.known:
            self.known[name], self.why[name] = value, why

    @property
    def opened(self) -> list[str]:
        """What shapes cannot tell and the files do not say."""
        names = (*ROPE_FIELDS, LAYOUT, "norm")
        return [name for name in names if name not in self.known]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        width: int = self.known["hidden_size"] // self.known["num_heads"]
        return width

    def config(self, chosen: Mapping[str, Any] | None = None) -> ModelConfig:
        """The ModelConfig of what is known, and of what was chosen for what is open."""
        names = {each.name for each in fields(ModelConfig)}
        values = {k: v for k, v in (self.known | dict(chosen or {})).items() if k in names}
        try:
            return ModelConfig.from_dict(values)
        except ConfigError as error:
            raise CheckpointError(f"{self.source.path}: {error}") from error


def describe(source: Source, declared: Mapping[str, Any] | None = None) -> Description:
    """Recognise a checkpoint and gather what it says.

    declared: what the user says; it counts before all else. Raises CheckpointError, naming the
    tensor or setting, for what is not supported, missing or too much.
    """
    found = recognise(source)
    chosen = found.format
    description = Description(source, chosen, found.parts, found.num_layers)
    for name, value in (declared or {}).items():
        description.note(name, value, "declared")
    _check_settings(source, chosen)
    for name, setting in chosen.settings.items():
        value, key = _look_up(source, setting)
        description.note(name, value, f"{source.settings_file}: {key}" if key else "the default")
    for name, value in chosen.fixed.items():
        description.note(name, value, "the architecture")
    if heads := re.search(r"\bn_head\s*:\s*int\s*=\s*(\d+)", source.code):
        description.note("num_heads", int(heads[1]), "the trainer's code in the file")
    if chosen.complete_with in source.settings:
        for each in fields(ModelConfig):
            if each.default is not MISSING:
                description.note(each.name, each.default, "the default")
    _from_shapes(description)
    _check_types(description)
    _from_tensors(description)
    _from_frequencies(description)
    _check_decay(description)
    _settle_rotation(description)
    if chosen.layout is not None or "norm.bias" in description.parts:
        description.note("norm", "layernorm", "the architecture")
    if chosen.layout is not None:
        description.note(LAYOUT, chosen.layout, "the architecture")
    elif len(description.parts["blocks.0.qkv.weight"]) == 3:
        description.note(LAYOUT, "stacked", "q, k and v are apart")
    if description.known.get(LAYOUT) not in (None, *get_args(Layout)):
        raise CheckpointError(
            f"{LAYOUT} must be one of {', '.join(get_args(Layout))}; "
            f"got {description.known[LAYOUT]!r}"
        )
    _check_shapes(description)
    return description


def _get(settings: Mapping[str, Any], key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _look_up(source: Source, setting: Setting) -> tuple[Any, str]:
    """A setting's value in our words, and the key that says it; '' for the default."""
    value, said = setting.default, ""
    for key in setting.keys:
        found = _get(source.settings, key)
        if found is not None:
            value, said = found, key
            break
    if setting.values is not None and value is not None:
        if isinstance(value, list | dict) or value not in setting.values:
            raise CheckpointError(
                f"{source.path}: {said} is {value!r}; supported: "
                f"{', '.join(map(str, setting.values))}"
            )
        value = setting.values[value]
    return value, said


def _check_settings(source: Source, chosen: Format) -> None:
    """Raise where the settings are another format's, or ask for what the engine has not."""
    if chosen.settings_name and source.settings_file in {"", *SETTINGS_FILES} - {
        chosen.settings_name
    }:
        raise CheckpointError(
            f"{source.path}: {chosen.title} keeps its settings in {chosen.settings_name}, which is "
            "not beside the weights"
        )
    said = source.settings.get("model_type")
    if said is not None and chosen.model_types and said not in chosen.model_types:
        raise CheckpointError(
            f"{source.path}: model_type is {said!r} in {source.settings_file}; the tensors are "
            f"those of {chosen.title}, which says {' or '.join(chosen.model_types)}"
        )
    for limit in chosen.limits:
        value = _get(source.settings, limit.key)
        allowed = [
            _get(source.settings, each) if isinstance(each, str) and each == "n_head" else each
            for each in limit.allowed
        ]
        if value not in allowed:
            raise CheckpointError(
                f"{source.path}: {limit.key} is {value!r} in {source.settings_file}: "
                f"{limit.reason}; not supported"
            )
    if source.settings.get("n_kv_head") is not None and chosen.name != "modded-nanogpt":
        raise CheckpointError(f"{source.path}: n_kv_head: grouped queries are not supported")


def _from_shapes(description: Description) -> None:
    parts, why = description.parts, "shapes"
    rows, width = parts["embedding.weight"][0].shape
    description.note("num_layers", description.num_layers, why)
    description.note("hidden_size", width, why)
    description.note("padded_vocab_size", rows, why)
    up = "mlp.up" not in description.format.transposed
    if "blocks.0.mlp.up.weight" in parts:
        inner = parts["blocks.0.mlp.up.weight"][0].shape[0 if up else 1]
        description.note("intermediate_size", inner, why)
    for name, tensor in {
        "attention_bias": "blocks.0.qkv.bias",
        "mlp_bias": "blocks.0.mlp.up.bias",
        "norm_bias": "norm.bias",
        "head_bias": "head.bias",
        "norm_weight": "norm.weight",
    }.items():
        description.note(name, tensor in parts, "there or not")


def _from_tensors(description: Description) -> None:
    """What values tell: whether the head is the embedding, and stored frequencies."""
    parts, known = description.parts, description.known
    if "head.weight" not in parts:
        if known.get("tie_embeddings") is False:
            raise CheckpointError(f"{description.source.path}: head.weight is missing, not tied")
        known.pop("tie_embeddings", None)
        description.note("tie_embeddings", True, "no head of its own")
    else:
        head, embedding = parts["head.weight"][0], parts["embedding.weight"][0]
        same = head.shape == embedding.shape and torch.equal(head.read(), embedding.read())
        if description.format.fixed.get("tie_embeddings") and not same:
            raise CheckpointError(
                f"{head.file}: tensor {head.name} is not the embedding: later modded-nanogpt and "
                "nanochat, which normalise the embedding and cap the logits, are not supported"
            )
        known.pop("tie_embeddings", None)
        description.note("tie_embeddings", same, "the head's values")
    eos = known.get("eos_token_id")
    description.note("vocab_size", known["padded_vocab_size"], "shapes")
    known["vocab_size"] = min(known["vocab_size"], known["padded_vocab_size"])
    if eos is not None and not 0 <= eos < known["vocab_size"]:
        why = description.why["eos_token_id"]
        if why == "declared":
            raise CheckpointError(
                f"{description.source.path}: eos_token_id must be an id below "
                f"{known['vocab_size']}, got {eos}"
            )
        # GPT-2's 50,256 stands in many a config.json whose vocabulary is smaller.
        description.why["eos_token_id"] = f"{why} is {eos}, which no token has"
        known.pop("eos_token_id")


def _from_frequencies(description: Description) -> None:
    """Stored frequencies, where the rotation is open; they must agree with what is said."""
    pattern, tensors = re.compile(r".*\b(inv_)?freqs?"), description.source.tensors
    found = {name: tensors[name] for name in tensors if pattern.fullmatch(name)}
    if description.known.get(LEARNED, "none") != "none":  # a model directory of ours
        description.parts |= {FREQUENCIES: [found[FREQUENCIES]]} if FREQUENCIES in found else {}
        return
    if not description.opened:
        return
    if own := learned(found, description.num_layers):
        why = "stored frequencies, which follow no base"
        description.parts[FREQUENCIES] = own
        description.note(LEARNED, "shared" if len(own) == 1 else "per_layer", why)
        description.note("rope_base", 10_000.0, "not used")
        description.note("rotary_dim", 2 * own[0].shape[0], why)
        description.note("pairing", "interleaved", "stored frequencies")
        description.note("rope_sign", 1, "stored frequencies")
        return
    for name, value in from_frequencies(found).items():
        if description.known.get(name, value) != value and description.why[name] != "declared":
            raise CheckpointError(
                f"{description.source.path}: stored frequencies say {name} {value}, "
                f"{description.why[name]} {description.known[name]}; declare which is right"
            )
        description.note(name, value, "stored frequencies")


def _check_decay(description: Description) -> None:
    """Older versions of rotary-embedding-torch leave xPos's zeta behind, but not its scale_base."""
    for name, tensor in description.source.tensors.items():
        if re.fullmatch(r".*rotary.*\.scale", name) and "rope" not in description.known:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} says xPos, and not its scale_base; declare rope, "
                'such as {"type": "xpos", "scale_base": 512}, or {"type": "default"} for none'
            )


def _check_types(description: Description) -> None:
    """What is computed with before ModelConfig checks everything."""
    known, path = description.known, description.source.path
    sizes = ("hidden_size", "padded_vocab_size", "num_layers", "intermediate_size")
    for name in ("num_heads", "max_position", "vocab_size", *sizes):
        value = known.get(name, known["padded_vocab_size"] if name == "vocab_size" else None)
        if value is None:
            raise CheckpointError(f"{path}: nothing says {name}; declare it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{path}: {name} must be a positive integer, got {value!r}")
    for name in ("rope_base", "rotary_fraction"):
        value = known.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
            raise CheckpointError(f"{path}: {name} must be a number, got {value!r}")
    eos = known.get("eos_token_id")
    if isinstance(eos, list):
        known["eos_token_id"] = eos = eos[0] if eos else None
    if isinstance(eos, bool) or not isinstance(eos, int | None):
        raise CheckpointError(f"{path}: eos_token_id must be an integer, got {eos!r}")
    if known["hidden_size"] % known["num_heads"]:
        raise CheckpointError(
            f"{path}: a width of {known['hidden_size']} does not divide into "
            f"{known['num_heads']} heads"
        )
    head_dim = known.pop("head_dim", None)
    if head_dim is not None and head_dim != description.head_dim:
        raise CheckpointError(
            f"{path}: heads of {head_dim} do not fill a width of {known['hidden_size']}"
        )


def _settle_rotation(description: Description) -> None:
    known = description.known
    fraction = known.pop("rotary_fraction", None)
    why = description.why.pop("rotary_fraction", "")
    if fraction is not None:
        description.note("rotary_dim", int(description.head_dim * fraction), why)
    if "rope_base" in known:
        known["rope_base"] = float(known["rope_base"])


def _check_shapes(description: Description) -> None:
    """Every tensor of the network there, in its shape and a float type; nothing is read."""
    config = description.config(_any_for_open(description))
    with torch.device("meta"):
        expected = GPT2(config).state_dict()
    if config.tie_embeddings:
        expected = {name: t for name, t in expected.items() if name != "head.weight"}
    for name, tensor in expected.items():
        there = description.parts.get(name)
        if there is None:
            raise CheckpointError(f"{description.source.path}: what makes {name} is missing")
        module = name.rpartition(".")[0].removeprefix("blocks.").lstrip("0123456789.")
        shape = list(tensor.shape)
        if name == FREQUENCIES and len(there) > 1:
            shape = shape[1:]
        elif len(there) > 1:
            shape[0] //= len(there)
        if module in description.format.transposed and len(shape) == 2:
            shape.reverse()
        for each in there:
            _check_tensor(each, shape)
    for name in sorted(description.parts.keys() - expected.keys() - {"head.weight"}):
        neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        for each in description.parts.pop(name):
            if not (each.read() == neutral).all():
                raise CheckpointError(
                    f"{each.file}: tensor {each.name} has no place: others like it are missing, or "
                    "the settings say that there is none"
                )


def _check_tensor(tensor: StoredTensor, shape: Iterable[int]) -> None:
    if tensor.shape != tuple(shape):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(tensor.shape)}, "
            f"{list(shape)} is needed"
        )
    if tensor.dtype not in FLOAT_TYPES.values():
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has type {tensor.dtype}; one of "
            f"{', '.join(FLOAT_TYPES)} is needed"
        )


def _any_for_open(description: Description) -> dict[str, Any]:
    """Any values at all for what is open: shapes do not depend on them."""
    some = {
        "pairing": "half",
        "rope_sign": 1,
        "rope_base": 10_000.0,
        "rotary_dim": description.head_dim // 2 * 2,
        "norm": "layernorm",
    }
    return {name: value for name, value in some.items() if name in description.opened}
