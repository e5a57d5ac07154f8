"""How a checkpoint was rotated: what its files do not say, a text tells.

A model rotated the wrong way still writes fluently, but it predicts worse: every open candidate is
scored on the same text, and the best one wins if its margin is beyond chance. Candidates are
thinned out on growing parts of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import product
from types import MappingProxyType
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from engine.errors import CheckpointError
from engine.frontend.tokenizer import Tokenizer
from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import canonical
from engine.model.rope import RotaryTable
from weights.formats.assembly import assemble, stack_rows
from weights.formats.description import LAYOUT, Description
from weights.formats.table import Layout

OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "pairing": ("half", "interleaved"),
        "rope_sign": (1, -1),
        "rope_base": (10_000.0, 1e3, 2e3, 5e3, 5e4, 1e5, 5e5, 1e6),
        LAYOUT: ("stacked", "per_head"),
        "norm": ("layernorm", "rmsnorm"),
    }
)
"""What is tried for a field that is open; rotary_dim's depend on the head."""

ROUNDS = ((128, 24), (512, 6))
"""(tokens that all are scored on, how many stay)"""

MAX_TOKENS = 4096
WINDOW = 512
"""Tokens of the last round, in windows; a base only shows over a distance."""

CLEAR_ERRORS, CLEAR_NATS = 4.0, 0.002
"""A margin is clear beyond this many standard errors, and nats per token."""


@dataclass(frozen=True)
class Scored:
    """A candidate and what it paid for each token, float64 [tokens], in nats."""

    values: dict[str, Any]
    losses: Tensor

    @property
    def nats(self) -> float:
        """Per token."""
        return self.losses.mean().item()

    @property
    def perplexity(self) -> float:
        """e to the nats per token."""
        return math.exp(min(self.nats, 700.0))


@dataclass(frozen=True)
class Verdict:
    """Scored candidates, best first; those of earlier rounds, on fewer tokens, come last."""

    scored: list[Scored]
    clear: bool
    sentence: str

    @property
    def best(self) -> dict[str, Any]:
        """The winner's values."""
        return self.scored[0].values


def sample_text() -> str:
    """The opening of Lewis Carroll's Alice's Adventures in Wonderland (1865), public domain."""
    return resources.files("weights").joinpath("sample.txt").read_text("utf-8")


def candidates(description: Description) -> list[dict[str, Any]]:
    """Every combination of what is open, the commonest first."""
    head = description.head_dim
    dims = {head, head // 2, head // 4, 32, 64}
    options = dict(OPTIONS)
    options["rotary_dim"] = tuple(
        sorted((d for d in dims if 2 <= d <= head and d % 2 == 0), reverse=True)
    )
    names = description.opened
    return [
        dict(zip(names, values, strict=True)) for values in product(*(options[n] for n in names))
    ]


def judge(
    description: Description,
    tokenizer: Tokenizer,
    text: str | None = None,
    console: Console | None = None,
) -> Verdict:
    """Score the candidates on a text, else on the sample. Raises CheckpointError."""
    ids = tokenizer.encode(sample_text() if text is None else text)[: MAX_TOKENS + 1]
    if len(ids) < 256:
        raise CheckpointError(f"the text has {len(ids)} tokens; at least 256 are needed to tell")
    if max(ids) >= description.known["padded_vocab_size"]:
        raise CheckpointError("the tokenizer is another model's: its ids exceed the embedding")
    scorer = _Scorer(description, torch.tensor(ids))
    running = candidates(description)
    dropped: list[Scored] = []
    with Progress(console=console, disable=console is None, transient=True) as progress:
        for tokens, stay in (*ROUNDS, (len(ids) - 1, 0)):
            task = progress.add_task(f"{tokens} tokens", total=len(running))
            scored = []
            for values in running:
                scored.append(Scored(values, scorer.losses(values, min(tokens, len(ids) - 1))))
                progress.advance(task)
            scored.sort(key=lambda each: each.nats)
            if stay:
                dropped = scored[stay:] + dropped
                running = [each.values for each in scored[:stay]]
    clear, sentence = _margin(scored, description.known["vocab_size"])
    return Verdict(scored + dropped, clear, sentence)


def _margin(scored: list[Scored], vocab_size: int) -> tuple[bool, str]:
    """Whether the first is better than the second beyond chance, and both in words."""
    best = scored[0]
    if best.nats > 0.8 * math.log(vocab_size):
        return False, (
            f"the best candidate's perplexity is {best.perplexity:,.1f} over {vocab_size:,} ids, "
            "hardly better than chance"
        )
    if len(scored) == 1:
        return True, "one candidate"
    difference = scored[1].losses - best.losses
    margin = difference.mean().item()
    error = difference.std().item() / math.sqrt(len(difference))
    words = (
        f"{margin:.4f} nats per token ({margin / error if error else 0:.1f} standard errors) "
        "between the best and the next"
    )
    return margin > max(CLEAR_NATS, CLEAR_ERRORS * error), words


class _Scorer:
    """One model in memory; a candidate changes only its qkv."""

    def __init__(self, description: Description, ids: Tensor) -> None:
        self._description = description
        self._ids = ids
        config = description.config(_first(description))
        self._tensors = {
            name: assemble(description, name, "stacked", config).float()
            for name in description.parts
        }
        self._window = min(WINDOW, description.known["max_position"])

    @torch.inference_mode()
    def losses(self, values: Mapping[str, Any], count: int) -> Tensor:
        """-ln p of the first `count` tokens after the first, float64."""
        config = self._description.config(values)
        layout = cast(Layout, (self._description.known | dict(values))[LAYOUT])
        with torch.device("meta"):
            model = GPT2(config)
        tensors = dict(self._tensors)
        for name, tensor in tensors.items():
            if ".qkv." in name:
                tensors[name] = canonical(name, stack_rows(tensor, layout, config), config)
            elif ".qk_norm." in name:
                tensors[name] = canonical(name, tensor, config)
        if config.tie_embeddings:
            tensors["head.weight"] = tensors["embedding.weight"]
        model.load_state_dict(tensors, assign=True)
        attention = CausalAttention(RotaryTable.for_model(config, self._window), config.num_heads)
        found: list[Tensor] = []
        for start in range(0, count, self._window):
            end = min(start + self._window, count)
            hidden = model(self._ids[None, start:end], attention)[0]
            logits = model.logits(hidden).float()
            targets = self._ids[start + 1 : end + 1]
            found.append(F.cross_entropy(logits, targets, reduction="none").double())
        return torch.cat(found)


def _first(description: Description) -> dict[str, Any]:
    return next(iter(candidates(description)))


def _rows(description: Description) -> Iterator[tuple[str, str, str]]:
    for name, value in description.known.items():
        yield name, str(value), description.why.get(name, "")


def show_description(description: Description, console: Console) -> None:
    """What the files say, and what they leave open."""
    console.print(f"[bold]{description.source.path}[/bold]: {description.format.title}")
    table = Table("setting", "value", "from")
    for row in _rows(description):
        table.add_row(*row)
    console.print(table)
    opened = description.opened
    console.print(f"open: {', '.join(opened)}" if opened else "open: nothing")


def show_verdict(verdict: Verdict, console: Console, limit: int = 16) -> None:
    """Candidates by perplexity, and the winner with its margin."""
    names = list(verdict.best)
    table = Table(*names, "tokens", "perplexity")
    for each in verdict.scored[:limit]:
        cells = [str(each.values[name]) for name in names]
        table.add_row(*cells, str(len(each.losses)), f"{each.perplexity:,.3f}")
    console.print(table)
    if len(verdict.scored) > limit:
        console.print(f"and {len(verdict.scored) - limit} more, all worse")
    winner = ", ".join(f"{name} {value}" for name, value in verdict.best.items())
    if verdict.clear:
        console.print(f"verdict: {winner}; {verdict.sentence}")
    else:
        console.print(
            f"no verdict: {verdict.sentence}. Declare what you know (--set), or give a text like "
            "the training text (--text)"
        )
