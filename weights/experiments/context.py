"""How far can a trained context be stretched? Perplexity against position, by the engine itself.

    python -m weights.experiments.context --corpus DIR --work DIR --out DIR [--model MODEL_DIR]
    python -m weights.experiments.context ... --fine-tune 40    # and after a short fine-tune

Scores held-out text that is `--times` as long as the model's context, through the serving engine:
with no scaling at all, with position interpolation, NTK-aware scaling, dynamic NTK and YaRN, and
with `overflow: shift`, whose context stays as it is. xPos is another network, not a way to read
with this one: weights.experiments.xpos.

Fine-tuning follows the papers (weights.experiments.tune): position interpolation, YaRN, and no
scaling at all (`--tune default`). The work folder keeps what has been measured, so what was stopped
goes on. Writes context.json and context.svg, and prints a table.
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
from engine.scaling import RopeScaling, ScalingType
from weights.experiments.picture import Curve, Panel
from weights.experiments.results import machine, write
from weights.experiments.stretch import PARTS, Way, middles, stretches, unscaled_copy
from weights.experiments.tune import Tuning, fine_tune
from weights.prepare import prepare
from weights.recipe import Recipe, TrainingConfig
from weights.tokens import Tokens, open_tokens

DEFAULT = Path(__file__).parents[1] / "default"
TUNED = ("linear", "yarn", "default")
"""What the papers fine-tune, and no scaling at all."""

BASELINE = "shift"
"""What the others are compared with: the trained context, moved along."""


def ways(times: int) -> list[Way]:
    """All that can be asked of a model as it is."""
    kinds: tuple[ScalingType, ...] = ("linear", "ntk", "dynamic", "yarn")
    stretched = [RopeScaling(type=kind, factor=times) for kind in kinds]
    return [
        Way(BASELINE, shift=True),
        Way("none"),
        *(Way(rope.type, rope) for rope in stretched),
    ]


class Experiment:
    """A model, texts, and a work folder with what was measured of them.

    Raises ConfigError where the folder has it of others.
    """

    def __init__(self, model_dir: Path, texts: Sequence[list[int]], times: int, work: Path) -> None:
        self.model_dir = model_dir
        self.texts = texts
        self.times = times
        self.trained = read_config(model_dir).max_position
        self.work = work / f"context-{times}x"
        self.work.mkdir(parents=True, exist_ok=True)
        self._of = {"times": times, "texts": [text[:4] for text in texts]}

    def _kept(self, name: str, more: Mapping[str, Any]) -> tuple[Path, dict[str, Any] | None]:
        path = self.work / f"{name}.json"
        if not path.exists():
            return path, None
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] != self._of | dict(more):
            raise ConfigError(
                f"{path} is of other texts or steps: choose another --work, or remove it"
            )
        return path, kept

    def _keep(self, path: Path, more: Mapping[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        path.write_text(json.dumps({"of": self._of | dict(more), **row}) + "\n", encoding="utf-8")
        return row

    def as_it_is(self, way: Way) -> dict[str, Any]:
        """Nats per token, by text: within the trained context, beyond it, by position."""
        path, kept = self._kept(way.name, {})
        if kept is not None:
            return kept
        if way.rope is not None or way.shift:
            return self._keep(path, {}, way.read(self.model_dir, self.texts, self.trained))
        with tempfile.TemporaryDirectory() as folder:
            copy = unscaled_copy(self.model_dir, Path(folder), self.times)
            return self._keep(path, {}, way.read(copy, self.texts, self.trained))

    def tuned(self, kind: str, sources: Mapping[str, Tokens], tuning: Tuning) -> dict[str, Any]:
        """The same after a fine-tune. kind: of a scaling, or `default` for none at all."""
        path, kept = self._kept(f"{kind}, fine-tuned", asdict(tuning))
        if kept is not None:
            return kept
        factor = self.times if kind != "default" else 1
        rope = RopeScaling.from_dict({"type": kind} | ({"factor": factor} if factor > 1 else {}))
        folder = self.work / f"tuned-{kind}"
        length = self.times * self.trained
        seconds = fine_tune(self.model_dir, folder, sources, rope, length, tuning)
        way = Way(kind, rope if kind != "default" else None)
        row = way.read(folder, self.texts, self.trained)
        return self._keep(path, asdict(tuning), row | {"step_s": round(seconds, 2)})


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per way: perplexities over all texts.

    beyond_to_shift: a multiple of shift's on the same tokens, [mean, least, most] over the texts.
    """
    base = results[BASELINE]
    rows = []
    for name, result in results.items():
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
    """Markdown."""
    lines = [
        f"Perplexity of {document['texts']} held-out texts of {document['length']:,} tokens, "
        f"{document['times']} times the trained context of {document['trained']:,}; and as a "
        f"multiple of `{BASELINE}`'s on the same tokens (least to most of the texts).",
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
    return "\n".join(lines) + "\n"


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Nats above shift's on the same tokens, against position: as it is, and fine-tuned."""
    length = document["length"]
    at = middles(length)
    base = document["results"][BASELINE]["by_position"]
    drawn: dict[bool, dict[str, Curve]] = {False: {}, True: {}}
    for name, result in document["results"].items():
        runs = [
            [a - b for a, b in zip(text, shifted, strict=True)]
            for text, shifted in zip(result["by_position"], base, strict=True)
        ]
        kind, _, tuned = name.partition(", ")
        drawn[bool(tuned)][kind] = Curve(at, runs)
    across = f"position (trained: {document['trained']:,})"
    up = f"nats per token above {BASELINE}"
    titles = {False: "as it is", True: f"after {document['tuning']['steps']} steps of fine-tuning"}
    return [
        Panel(titles[tuned], across, up, curves, bands=False)
        for tuned, curves in drawn.items()
        if curves
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
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
    parser.add_argument("--tune", nargs="+", choices=TUNED, default=TUNED, help="which; all")
    options = parser.parse_args(arguments)
    config = TrainingConfig(recipe=Recipe(steps=1))
    # The model has a tokenizer, which is taken as it is: nothing is written there.
    tokens = prepare(options.corpus, options.model, options.work, config, Console(stderr=True))
    length = options.times * read_config(options.model).max_position
    held_out = open_tokens(tokens / "heldout")
    texts = stretches(list(held_out.values()), length, options.texts)
    experiment = Experiment(options.model, texts, options.times, options.work)
    results = {
        way.name: experiment.as_it_is(way) for way in tqdm(ways(options.times), desc="scalings")
    }
    tuning = Tuning(options.fine_tune)
    if tuning.steps:
        sources = {n: t for n, t in open_tokens(tokens / "train").items() if len(t) > length}
        for kind in options.tune:
            name = "none" if kind == "default" else kind
            results[f"{name}, fine-tuned"] = experiment.tuned(kind, sources, tuning)
    document = {
        "machine": machine(),
        "texts": len(texts),
        "length": length,
        "times": options.times,
        "trained": experiment.trained,
        "tuning": asdict(tuning),
        "summary": summarise(results),
        "results": results,
    }
    write(options.out, "context", document, panels(document))
    print(table(document))


if __name__ == "__main__":
    main()
