"""Ways to go past a trained context, and what they make of held-out texts, by the engine itself."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import LLM, RequestOptions
from engine.scaling import SCALING_OPTIONS, RopeScaling, ScalingType
from weights.corpus.tokens import Tokens
from weights.experiments.search import best_number

KINDS: tuple[ScalingType, ...] = ("linear", "ntk", "dynamic", "yarn")
PARTS = 32
"""Stretches of positions whose mean is a point of the picture."""


def _spaced(sources: Sequence[Tokens], length: int, count: int) -> list[tuple[Tokens, int, int]]:
    """The sources that are long enough, in turn: a source, where a text starts, the spacing."""
    long = [tokens for tokens in sources if len(tokens) >= length]
    if not long:
        raise ValueError(f"no held-out source has {length:,} tokens")
    turns = max(1, -(-count // len(long)))
    spaced = []
    for number in range(count):
        tokens, turn = long[number % len(long)], number // len(long)
        spacing = (len(tokens) - length) // turns
        spaced.append((tokens, turn * spacing, spacing))
    return spaced


def stretches(sources: Sequence[Tokens], length: int, count: int) -> list[list[int]]:
    """`count` texts of `length` tokens, from all sources in turn, evenly spaced.

    Raises ValueError where no source is so long.
    """
    spaced = _spaced(sources, length, count)
    return [tokens[start : start + length].tolist() for tokens, start, _ in spaced]


def between(sources: Sequence[Tokens], length: int, count: int) -> list[list[int]]:
    """Texts that lie half-way between those of `stretches`, where no token is in both.

    Raises ValueError where there is no room for any.
    """
    texts = [
        tokens[start + spacing // 2 :][:length].tolist()
        for tokens, start, spacing in _spaced(sources, length, count)
        if spacing // 2 >= length and spacing - spacing // 2 >= length
    ]
    if not texts:
        raise ValueError(
            f"no held-out source has room for {length:,} tokens between each two of the texts: "
            "fewer texts, or more held out"
        )
    return texts


def unscaled_copy(model_dir: Path, folder: Path, times: int) -> Path:
    """The same model, declared to have been trained so many times as far: no scaling at all."""
    for path in model_dir.iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    config["max_position"] *= times
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def engine(model_dir: Path) -> LLM:
    """One sequence at a time: memory is for its length. float32: rounding is not the question."""
    return LLM(model_dir, device="cpu", dtype="float32", kv_memory=512 * 2**20, max_num_seqs=1)


@dataclass(frozen=True)
class Way:
    """How a text is read. rope: None is the model's own. shift: by `overflow`, past the context."""

    name: str
    rope: RopeScaling | None = None
    shift: bool = False

    def read(self, model_dir: Path, texts: Sequence[list[int]], trained: int) -> dict[str, Any]:
        """Mean nats per token of each text: `within` the trained context, `beyond` it, and
        `by_position`."""
        losses = self.nats(engine(model_dir), texts, trained)
        return {
            "within": [statistics.mean(text[: trained - 1]) for text in losses],
            "beyond": [statistics.mean(text[trained - 1 :]) for text in losses],
            "by_position": by_position(losses),
        }

    def nats(self, llm: LLM, texts: Sequence[list[int]], trained: int) -> list[list[float]]:
        """-ln p of each token but the first, by text; float [texts][length - 1].

        Dynamic NTK is scored as it would be generated, each token under the factor of its own
        length: by the prefix that ends where the factor changes.
        """
        lengths = {len(text) for text in texts}
        ends = [max(lengths)]
        if self.rope is not None and self.rope.type == "dynamic":
            end = self.rope.steady_until(1, trained)
            ends = [end]
            while end < max(lengths):
                end = self.rope.steady_until(end + 1, trained)
                ends.append(end)
        losses: list[list[float]] = [[] for _ in texts]
        for end in ends:
            read = self._score(llm, [text[:end] for text in texts])
            losses = [old + new[len(old) :] for old, new in zip(losses, read, strict=True)]
        return losses

    def _score(self, llm: LLM, texts: Sequence[list[int]]) -> list[list[float]]:
        options = RequestOptions(overflow="shift") if self.shift else RequestOptions()
        scores = llm.score(list(texts), options, rope=self.rope)
        return [[-each.logprob for each in score.logprobs] for score in scores]


def scaled(kind: ScalingType, factor: float, trained: int) -> Way:
    """A scaling of the trained context, which is said wherever the formula asks for it."""
    values: dict[str, Any] = {"type": kind, "factor": factor}
    if "original_context" in SCALING_OPTIONS[kind]:
        values["original_context"] = trained
    return Way(f"{kind}, factor {factor:g}", RopeScaling.from_dict(values))


def try_factors(times: int, measure: Callable[[float], float]) -> dict[float, float]:
    """Losses by factor, in order: of `times`, doubled or halved until the best is no edge, or 1."""
    losses = {float(times): measure(times)}
    best_number(losses, measure, least=1)
    return dict(sorted(losses.items()))


def best_factor(losses: Mapping[float, float], times: int) -> float:
    """The factor of the least loss; `times` where that is 1: no scaling, which has its own row."""
    best = min(losses, key=losses.__getitem__)
    return best if best > 1 else float(times)


def by_position(losses: Sequence[Sequence[float]]) -> list[list[float]]:
    """Mean nats of each of PARTS stretches of positions, by text."""
    parts = np.array_split(np.array(losses), PARTS, axis=1)
    return [[round(float(v), 4) for v in row] for row in np.array([p.mean(1) for p in parts]).T]


def middles(length: int) -> list[float]:
    """Where the PARTS stretches of so many positions have their middles."""
    return [(part + 0.5) * length / PARTS for part in range(PARTS)]
