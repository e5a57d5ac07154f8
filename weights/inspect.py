"""How a checkpoint was rotated: what its files do not say, a text tells.

A model rotated the wrong way still writes fluently, but it predicts worse: every open candidate is
scored on the same text, and the best one wins if its margin is beyond chance. Candidates are
thinned out on growing parts of the text. Bases are the hardest to tell apart: where the text does
not tell the best one from the usual one, the usual one is taken, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from itertools import product
from types import MappingProxyType
from typing import Any, cast

import torch
from rich import box
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

USUAL_BASE = 10_000.0
"""Of the paper, and of nearly everyone since."""

OPTIONS: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "pairing": ("half", "interleaved"),
        "rope_sign": (1, -1),
        "rope_base": (USUAL_BASE, 1e3, 1e5, 5e5, 1e6),
        LAYOUT: ("stacked", "per_head"),
        "norm": ("layernorm", "rmsnorm"),
    }
)
"""What is tried for a field that is open; rotary_dim's depend on the head."""

ROUNDS = ((128, 12), (512, 4))
"""(tokens that all are scored on, how many stay)"""

MAX_TOKENS = 4096
WINDOW = 256
"""Tokens that are scored together. A base only shows over a distance, but over distances that a
model has seen little of in training a larger base than its own looks better: windows of 512 gave
one that was trained on 256 tokens five times its base.
"""

CLEAR_ERRORS, CLEAR_NATS = 4.0, 0.002
"""A margin is clear beyond this many standard errors, and nats per token."""


@dataclass(frozen=True, eq=False)
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
    """Scored candidates, the chosen one first; those of earlier rounds, on fewer tokens, last.

    clear: whether the margin suffices; sentence: the margin in words.
    """

    scored: list[Scored]
    clear: bool
    sentence: str

    @property
    def best(self) -> dict[str, Any]:
        """The winner's values."""
        return self.scored[0].values

    @property
    def words(self) -> str:
        """The winner's values, and the margin."""
        winner = ", ".join(f"{name} {value}" for name, value in self.best.items())
        return f"{winner}; {self.sentence}"


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
    ids = _encode(tokenizer, text)[: MAX_TOKENS + 1]
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
                losses = scorer.losses(values, min(tokens, len(ids) - 1))
                scored.append(Scored(values, losses))
                progress.advance(task)
            scored.sort(key=lambda each: each.nats)
            if stay:
                kept = scored[:stay] + _rival(scored[stay:], scored[0])
                dropped = [s for s in scored[stay:] if s not in kept[stay:]] + dropped
                running = [each.values for each in kept]
    return _verdict(scored, dropped, description.known["vocab_size"])


def _encode(tokenizer: Tokenizer, text: str | None) -> list[int]:
    """Token ids; an alphabet that lacks some characters of the sample does without them."""
    try:
        return tokenizer.encode(sample_text() if text is None else text)
    except UnicodeEncodeError as error:
        if text is not None:
            raise CheckpointError(f"the text cannot be tokenised: {error}") from error
    ids: list[int] = []
    for character in sample_text():
        with suppress(UnicodeEncodeError):
            ids += tokenizer.encode(character)
    return ids


def _rest(values: Mapping[str, Any]) -> dict[str, Any]:
    """All but the base, which is the hardest to tell: a wrong one costs the least."""
    return {name: value for name, value in values.items() if name != "rope_base"}


def _rival(scored: Sequence[Scored], best: Scored) -> list[Scored]:
    """The best one that differs in more than its base, so that the last round has one."""
    return [each for each in scored if _rest(each.values) != _rest(best.values)][:1]


def _lead(best: Scored, other: Scored) -> tuple[float, float]:
    """By how many nats per token the other is worse, and the standard error of that."""
    difference = other.losses - best.losses
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def _verdict(scored: list[Scored], dropped: list[Scored], vocab_size: int) -> Verdict:
    """The best one wins if it leads every other of the last round beyond chance.

    Where it only does not lead one of the same kind with the usual base, that one wins.
    """
    best = scored[0]
    if best.nats > 0.8 * math.log(vocab_size):
        reason = (
            f"the best candidate's perplexity is {best.perplexity:,.1f} over {vocab_size:,} ids, "
            "hardly better than chance"
        )
        return Verdict(scored + dropped, False, reason)
    near = []
    for other in scored[1:]:
        lead, error = _lead(best, other)
        if lead <= max(CLEAR_NATS, CLEAR_ERRORS * error):
            near.append(other)
    if len(scored) == 1:
        return Verdict(scored, True, "there is one candidate")
    lead, error = _lead(best, scored[1])
    words = f"{lead:.4f} nats per token (standard error {error:.4f}) better than the next"
    if not near:
        return Verdict(scored + dropped, True, words)
    usual = next((s for s in (best, *near) if s.values.get("rope_base") == USUAL_BASE), None)
    if usual is None or any(_rest(each.values) != _rest(best.values) for each in near):
        return Verdict(scored + dropped, False, f"the best is only {words}")
    others = sorted(s.values["rope_base"] for s in (best, *near) if s is not usual)
    rivals = [s for s in scored if _rest(s.values) != _rest(usual.values)]
    words = f"the text does not tell it from base {', '.join(f'{b:,.0f}' for b in others)}"
    words += f", so the usual {USUAL_BASE:,.0f} is taken"
    if rivals:
        lead, error = _lead(usual, rivals[0])
        words += f"; {lead:.4f} nats per token (standard error {error:.4f}) better than other kinds"
    scored = [usual, *(each for each in scored if each is not usual)]
    return Verdict(scored + dropped, True, words)


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
    table = Table("setting", "value", "from", box=box.SIMPLE_HEAD)
    for row in _rows(description):
        table.add_row(*row)
    console.print(table)
    opened = description.opened
    console.print(f"open: {', '.join(opened)}" if opened else "open: nothing")


def show_verdict(verdict: Verdict, console: Console, limit: int = 16) -> None:
    """Candidates by perplexity, and the winner with its margin."""
    names = list(verdict.best)
    table = Table(*names, "tokens", "perplexity", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for each in verdict.scored[:limit]:
        cells = [str(each.values[name]) for name in names]
        table.add_row(*cells, str(len(each.losses)), f"{each.perplexity:,.3f}")
    console.print(table)
    if len(verdict.scored) > limit:
        console.print(f"and {len(verdict.scored) - limit} more, all worse")
    if verdict.clear:
        console.print(f"verdict: {verdict.words}")
    else:
        console.print(
            f"no verdict: {verdict.sentence}. Declare what you know (--set), or give a text like "
            "the training text (--text)"
        )
