"""Does xPos hold where RoPE ends? The small models of weights.experiments.positions, far outside.

    python -m weights.experiments.xpos --work DIR --out DIR

xPos is trained, not chosen afterwards: so this compares networks that were trained alike, one per
seed, under RoPE and under xPos (Sun et al. 2022, arXiv 2212.10554), and reads texts of `--times`
their window through the serving engine: with no scaling, with `overflow: shift`, and RoPE's under
every scaling too, each at the factor that is best on other texts with the first seed's network. The
work folder is that of weights.experiments.positions, which keeps the models. Writes xpos.json and
xpos.svg, and prints a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.model.loader import read_config
from engine.scaling import ScalingType
from weights.corpus.tokens import open_tokens
from weights.experiments.picture import Curve, Panel
from weights.experiments.results import machine, write
from weights.experiments.small import SERVED, model_dir
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

SHIFT = Way("shift", shift=True)
NONE = Way("none")
OTHERS = 4
"""Of the texts between those reported, every so-manieth is for choosing factors."""


def read(
    folder: Path, texts: Sequence[list[int]], times: int, ways: Sequence[Way] = (NONE, SHIFT)
) -> dict[str, dict[str, Any]]:
    """Nats per token by way, over all texts: within the window, beyond it, by position."""
    trained = read_config(folder).max_position
    results = {}
    with tempfile.TemporaryDirectory() as copy:
        far = unscaled_copy(folder, Path(copy), times)
        for way in ways:
            by_text = way.read(folder if way.shift else far, texts, trained)
            results[way.name] = {
                "within": statistics.mean(by_text["within"]),
                "beyond": statistics.mean(by_text["beyond"]),
                "by_position": [
                    statistics.mean(part) for part in zip(*by_text["by_position"], strict=True)
                ],
            }
    return results


def choose(folder: Path, others: Sequence[list[int]], times: int) -> dict[str, dict[float, float]]:
    """Nats past the window by factor, of each scaling."""
    trained = read_config(folder).max_position

    def measure(kind: ScalingType, factor: float) -> float:
        way = scaled(kind, factor, trained)
        return float(read(folder, others, times, [way])[way.name]["beyond"])

    return {kind: try_factors(times, partial(measure, kind)) for kind in KINDS}


def table(document: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"Perplexity of {document['texts']} held-out texts of {document['length']:,} tokens, "
        f"{document['times']} times the trained window of {document['trained']}; mean of "
        f"{len(document['seeds'])} networks (least to most).",
        "",
        f"| | within the trained window | beyond it | in the last {document['length'] // PARTS} "
        "positions |",
        "|---|---|---|---|",
    ]
    for name, runs in document["results"].items():
        cells = []
        for values in (
            [run["within"] for run in runs],
            [run["beyond"] for run in runs],
            [run["by_position"][-1] for run in runs],
        ):
            mean, least, most = (
                math.exp(v) for v in (statistics.mean(values), min(values), max(values))
            )
            cells.append(f"{mean:.1f} ({least:.1f} to {most:.1f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Nats above those of RoPE under shift, on the same tokens and seed, against position."""
    length, base = document["length"], document["results"]["RoPE, shift"]
    curves = {
        name: Curve(
            middles(length),
            [
                [a - b for a, b in zip(run["by_position"], shifted["by_position"], strict=True)]
                for run, shifted in zip(runs, base, strict=True)
            ],
        )
        for name, runs in document["results"].items()
    }
    title = f"{len(document['seeds'])} networks: mean, least to most"
    across = f"position (trained: {document['trained']})"
    return [Panel(title, across, "nats per token above RoPE, shift", curves)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.xpos")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--times", type=int, default=8, help="how far to read")
    parser.add_argument("--texts", type=int, default=16, help="how many texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="networks")
    options = parser.parse_args(arguments)
    trained = read_config(model_dir(options.work, "RoPE", options.seeds[0])).max_position
    length = options.times * trained
    held_out = open_tokens(options.work / "tokens" / "heldout")
    sources = list(held_out.values())
    texts = stretches(sources, length, options.texts)
    others = between(sources, length, options.texts)[::OTHERS]
    first = model_dir(options.work, "RoPE", options.seeds[0])
    search = choose(first, others, options.times)
    chosen = {kind: best_factor(losses, options.times) for kind, losses in search.items()}
    ways = {name: [NONE, SHIFT] for name in SERVED}
    ways["RoPE"] += [scaled(kind, chosen[kind], trained) for kind in KINDS]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in tqdm(options.seeds, desc="networks"):
        for name in SERVED:
            folder = model_dir(options.work, name, seed)
            for way, result in read(folder, texts, options.times, ways[name]).items():
                results.setdefault(f"{name}, {way}", []).append(result)
    document = {
        "machine": machine(),
        "texts": len(texts),
        "length": length,
        "times": options.times,
        "trained": trained,
        "seeds": options.seeds,
        "others": len(others),
        "search": search,
        "results": results,
    }
    write(options.out, "xpos", document, panels(document))
    print(table(document))


if __name__ == "__main__":
    main()
