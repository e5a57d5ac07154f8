"""How far can a trained context be stretched? Perplexity against position, by the engine itself.

    python -m weights.experiments.context --corpus DIR --work DIR --out DIR [--model MODEL_DIR]
    python -m weights.experiments.context ... --fine-tune 50    # and after a short fine-tune

Scores held-out text that is `--times` as long as the model's context, through the serving engine:
with no scaling at all, with position interpolation, NTK-aware scaling, dynamic NTK and YaRN, and
with `overflow: shift`, whose context stays as it is. xPos is another network, not a way to read
with this one: weights.experiments.xpos.

The stretch itself is not the best factor for every formula, so each has its own chosen: the one of
least loss past the context on other held-out texts, which lie half-way between those that are
reported; doubled or halved from `--times` on until the best is no edge. Where that is 1, no scaling
at all, `--times` is reported.

Fine-tuning follows the papers (weights.experiments.tune): each way of TUNED on the same number of
tokens; `shift`, which needs no long windows, on windows of the context. The work folder keeps what
has been measured, so what was stopped goes on. Writes context.json and context.svg, and prints
tables.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from engine.errors import ConfigError
from engine.model.loader import read_config
from engine.scaling import UNSCALED, ScalingType
from weights.corpus.tokens import Tokens, open_tokens
from weights.experiments.picture import Curve, Panel
from weights.experiments.results import machine, write
from weights.experiments.stretch import (
    KINDS,
    PARTS,
    Way,
    best_factor,
    between,
    middles,
    scaled,
    stretches,
    try_factors,
    unscaled_copy,
)
from weights.experiments.tune import Tuning, fine_tune
from weights.training.prepare import prepare
from weights.training.recipe import Recipe, TrainingConfig

DEFAULT = Path(__file__).parents[1] / "default"
BASELINE = "shift"
"""What the others are compared with: the trained context, moved along."""

TUNED = (BASELINE, "linear", "yarn", "ntk", "none")
"""What is fine-tuned. Dynamic NTK has no one rotation that a network could get used to."""

AFTER = ", fine-tuned"


class Experiment:
    """A model, texts, and a work folder with what was measured of them.

    texts: what is reported; others: what factors are chosen by.
    Raises ConfigError where the folder has it of others.
    """

    def __init__(
        self,
        model_dir: Path,
        texts: Sequence[list[int]],
        others: Sequence[list[int]],
        times: int,
        work: Path,
    ) -> None:
        self.model_dir = model_dir
        self.texts = texts
        self.others = others
        self.times = times
        self.trained = read_config(model_dir).max_position
        self.work = work / f"context-{times}x"
        self.work.mkdir(parents=True, exist_ok=True)

    def _kept(self, name: str, of: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
        path = self.work / f"{name}.json"
        if not path.exists():
            return path, None
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] != of:
            raise ConfigError(
                f"{path} is of other texts or steps: choose another --work, or remove it"
            )
        return path, kept

    def _read(
        self, way: Way, name: str, texts: Sequence[list[int]], tuned: tuple[Path, Tuning] | None
    ) -> dict[str, Any]:
        """Nats per token, by text: within the trained context, beyond it, by position."""
        model_dir, tuning = tuned or (self.model_dir, None)
        of = {
            "times": self.times,
            "texts": [text[:4] for text in texts],
            "tuning": tuning and asdict(tuning),
        }
        path, kept = self._kept(name, of)
        if kept is not None:
            return kept
        with tempfile.TemporaryDirectory() as folder:
            # A scaling says what it stretches: so that any factor may be tried at this length.
            far = model_dir if way.shift else unscaled_copy(model_dir, Path(folder), self.times)
            row = {"of": of, **way.read(far, texts, self.trained)}
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        return row

    def measure(self, way: Way, tuned: tuple[Path, Tuning] | None = None) -> dict[str, Any]:
        """Of the texts that are reported. tuned: a model that was fine-tuned, and how."""
        return self._read(way, f"{way.name}{AFTER if tuned else ''}", self.texts, tuned)

    def search(self, kind: ScalingType) -> dict[float, float]:
        """Nats past the context in the other texts, by factor."""

        def measure(factor: float) -> float:
            way = scaled(kind, factor, self.trained)
            row = self._read(way, f"{way.name}, other texts", self.others, None)
            return float(statistics.mean(row["beyond"]))

        return try_factors(self.times, measure)

    def tune(self, way: Way, sources: Mapping[str, Tokens], tuning: Tuning) -> dict[str, Any]:
        """What measure() gives after a fine-tune, and step_s: processor seconds per step."""
        folder = self.work / f"tuned {way.name}"
        path, kept = self._kept(folder.name, asdict(tuning))
        if kept is None:
            length = self.times * self.trained
            windows = (self.times, self.trained) if way.shift else (1, length)
            rope = way.rope or UNSCALED
            step_s = fine_tune(self.model_dir, folder, sources, rope, windows, tuning)
            kept = {"of": asdict(tuning), "step_s": round(step_s, 2)}
            path.write_text(json.dumps(kept) + "\n", encoding="utf-8")
        return self.measure(way, (folder, tuning)) | {"step_s": kept["step_s"]}


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per way: perplexities over all texts.

    beyond_to_shift: a multiple of shift's on the same tokens, fine-tuned where the row is;
    [mean, least, most] over the texts.
    """
    rows = []
    for name, result in results.items():
        base = results[BASELINE + AFTER if name.endswith(AFTER) else BASELINE]
        above = [a - b for a, b in zip(result["beyond"], base["beyond"], strict=True)]
        last = [text[-1] for text in result["by_position"]]
        ratios = [round(math.exp(v), 3) for v in (statistics.mean(above), min(above), max(above))]
        rows.append(
            {
                "way": name,
                "within": round(math.exp(statistics.mean(result["within"])), 2),
                "beyond": round(math.exp(statistics.mean(result["beyond"])), 2),
                "last": round(math.exp(statistics.mean(last)), 2),
                "beyond_to_shift": ratios,
            }
        )
    return rows


def table(document: Mapping[str, Any]) -> str:
    """Markdown: what is reported, and what the factors were chosen by."""
    lines = [
        f"Perplexity of {document['texts']} held-out texts of {document['length']:,} tokens, "
        f"{document['times']} times the trained context of {document['trained']:,}; and as a "
        f"multiple of `{BASELINE}`'s on the same tokens, fine-tuned where the row is (least to "
        "most of the texts).",
        "",
        "| | within the trained context | beyond it | in the last "
        f"{document['length'] // PARTS} positions | beyond it, multiple of `{BASELINE}`'s |",
        "|---|---|---|---|---|",
    ]
    for row in document["summary"]:
        mean, least, most = row["beyond_to_shift"]
        lines.append(
            f"| {row['way']} | {row['within']:.1f} | {row['beyond']:.1f} | {row['last']:.1f} | "
            f"{mean:.2f} ({least:.2f} to {most:.2f}) |"
        )
    factors = sorted({float(f) for losses in document["search"].values() for f in losses})
    lines += [
        "",
        f"Perplexity beyond the trained context by factor, on {document['others']} other texts:",
        "",
        f"| | {' | '.join(f'{factor:g}' for factor in factors)} |",
        "|---" * (1 + len(factors)) + "|",
    ]
    for kind, losses in document["search"].items():
        known = {float(factor): f"{math.exp(nats):.1f}" for factor, nats in losses.items()}
        lines.append(f"| {kind} | {' | '.join(known.get(factor, '') for factor in factors)} |")
    return "\n".join(lines) + "\n"


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Nats above shift's on the same tokens, against position: as it is, and fine-tuned."""
    length, results = document["length"], document["results"]
    at = middles(length)
    drawn: dict[bool, dict[str, Curve]] = {False: {}, True: {}}
    for name, result in results.items():
        tuned = name.endswith(AFTER)
        base = results[BASELINE + AFTER if tuned else BASELINE]["by_position"]
        runs = [
            [a - b for a, b in zip(text, shifted, strict=True)]
            for text, shifted in zip(result["by_position"], base, strict=True)
        ]
        drawn[tuned][name.removesuffix(AFTER)] = Curve(at, runs)
    across = f"position (trained: {document['trained']:,})"
    up = f"nats per token above {BASELINE}"
    after = f"after {document['tuning']['steps']} steps of fine-tuning, {BASELINE} too"
    return [
        Panel(after if tuned else "as it is", across, up, curves, bands=False)
        for tuned, curves in drawn.items()
        if curves
    ]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.context")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="text")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and results")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", type=Path, default=DEFAULT, help="default: the shipped model")
    parser.add_argument("--times", type=int, default=8, help="how far to stretch")
    parser.add_argument("--texts", type=int, default=8, help="how many texts")
    parser.add_argument("--fine-tune", type=int, default=0, help="steps; 0: none")
    parser.add_argument("--learning-rate", type=float, default=Tuning.learning_rate)
    parser.add_argument("--tune", nargs="+", choices=TUNED, default=TUNED, help="which; all")
    options = parser.parse_args(arguments)
    if BASELINE not in options.tune:
        parser.error(f"--tune must have {BASELINE}: the others are compared with it")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _arguments(arguments)
    config = TrainingConfig(recipe=Recipe(steps=1))
    # The model has a tokenizer, which is taken as it is: nothing is written there.
    tokens = prepare(options.corpus, options.model, options.work, config, Console(stderr=True))
    trained = read_config(options.model).max_position
    length = options.times * trained
    held_out = list(open_tokens(tokens / "heldout").values())
    texts = stretches(held_out, length, options.texts)
    others = between(held_out, length, options.texts)
    experiment = Experiment(options.model, texts, others, options.times, options.work)
    search = {kind: experiment.search(kind) for kind in tqdm(KINDS, desc="factors")}
    factors = {kind: best_factor(losses, options.times) for kind, losses in search.items()}
    ways = [Way(BASELINE, shift=True), Way("none")]
    ways += [scaled(kind, factor, trained) for kind, factor in factors.items()]
    results = {way.name: experiment.measure(way) for way in tqdm(ways, desc="scalings")}
    tuning = Tuning(options.fine_tune, options.learning_rate)
    if tuning.steps:
        # Interpolation and YaRN are fine-tuned as their authors did, at the stretch itself.
        of = {kind: scaled(kind, options.times, trained) for kind in KINDS}
        of["ntk"] = scaled("ntk", factors["ntk"], trained)
        tuned_ways: dict[str, Way] = {BASELINE: ways[0], "none": ways[1]} | dict(of)
        sources = {n: t for n, t in open_tokens(tokens / "train").items() if len(t) > length}
        for kind in options.tune:
            way = tuned_ways[kind]
            results[way.name + AFTER] = experiment.tune(way, sources, tuning)
    document = {
        "machine": machine(),
        "texts": len(texts),
        "others": len(others),
        "length": length,
        "times": options.times,
        "trained": experiment.trained,
        "tuning": asdict(tuning),
        "search": search,
        "summary": summarise(results),
        "results": results,
    }
    write(options.out, "context", document, panels(document))
    print(table(document))


if __name__ == "__main__":
    main()
