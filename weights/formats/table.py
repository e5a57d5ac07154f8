"""What a format is: a table of names, and no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Layout = Literal["stacked", "per_head", "codegen"]
"""How the rows of one qkv product are ordered. stacked: all heads of q, of k, of v; per_head: q, k,
v of the first head, then of the next; codegen: q, v, k of the first quarter of the heads, and so on
"""

MODULES = ("embedding", "norm", "head")
"""Modules of engine.model.gpt2 outside its layers; those of a layer come after `blocks.{}.`."""

ROPE_FIELDS = ("pairing", "rope_sign", "rope_base", "rotary_dim")
"""What shapes cannot tell and files often do not say."""


@dataclass(frozen=True)
class Setting:
    """Where a format keeps a field of ModelConfig.

    keys: names in its settings file, the first that is there counts; dots lead into mappings.
    default: what an absent key means; None: nothing.
    values: their words for ours; None: the value as it stands.
    """

    keys: tuple[str, ...]
    default: Any = None
    values: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Limit:
    """A setting that the engine cannot follow unless it is one of `allowed`, absent counting None.

    allowed: values, or the name of a setting whose value it must have.
    """

    key: str
    allowed: tuple[Any, ...]
    reason: str


@dataclass(frozen=True)
class Format:
    """One layout.

    marks: regular expressions, each of which matches a tensor's whole name; that is how the format
    is recognised. model_types: what config.json must say, where it says anything.
    modules: our module -> theirs, or three of theirs to be put one below the other.
    transposed: our modules whose weights are stored [in, out], as Conv1D has them.
    layout: of the rows of qkv; None: a fork's own, as is its norm where that has no biases.
    settings_name: the file without which the settings' defaults mean nothing.
    complete_with: a settings file with this key is our own: what it does not say is ModelConfig's
    default.
    settings, fixed: where a field of ModelConfig stands, or what the architecture says of it.
    ignored: regular expressions of tensors that carry nothing, such as masks.
    limits: settings that the engine cannot follow as they may be.
    """

    name: str
    title: str
    marks: tuple[str, ...]
    modules: Mapping[str, str | tuple[str, str, str]]
    settings: Mapping[str, Setting]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    layout: Layout | None = "stacked"
    settings_name: str = ""
    complete_with: str = ""
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
