"""Does RoPE learn faster, cost less than a bias, and keep the cache valid?

    python -m weights.experiments.positions --corpus DIR --work DIR --out DIR
    python -m weights.experiments.positions ... --only runs --seeds 2   # in several processes
    python -m weights.experiments.positions ... --only times            # again, on a quiet machine

Trains the same small network under every encoding of weights.experiments.encodings: the same text,
batches, steps and seeds. DIR of --corpus is what weights.corpus wrote, or a folder of .txt files.
The work folder keeps tokens and every run that has ended, so what was stopped goes on there.
Writes positions.json and positions.svg, and prints tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from weights.experiments.encodings import ENCODINGS, SAME_COST
from weights.experiments.picture import Curve, Panel
from weights.experiments.results import machine, write
from weights.experiments.small import Laboratory, Plan, Run
from weights.experiments.timing import times

HeldOut = Mapping[int, float]
BASELINE = "learned absolute"
"""Its loss at the end is the level that the others are timed to."""


def steps_to(held_out: HeldOut, level: float) -> float | None:
    """The step at which a curve first reaches a loss, on straight lines between measurements."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(held_out.items()):
        if loss <= level:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (before[1] - level) / (before[1] - loss) * (step - before[0])
        before = step, loss
    return None


def spread(values: Sequence[float], digits: int) -> list[float]:
    """Mean, least and most."""
    return [round(v, digits) for v in (statistics.mean(values), min(values), max(values))]


def summarise(curves: Mapping[str, Sequence[HeldOut]], measured: Mapping[str, Any]) -> list[Any]:
    """A row per encoding, the best first; curves: by encoding, a run per seed.

    to_rope: difference of a run's last loss to that of RoPE with the same seed. level: the mean of
    learned positions at the end. Spreads are [mean, least, most] over the seeds, and over the
    repetitions [median, lower quartile, upper quartile].
    """
    final = {name: [curve[max(curve)] for curve in runs] for name, runs in curves.items()}
    level = statistics.mean(final[BASELINE])
    rows = []
    for name, runs in curves.items():
        reached = [steps for curve in runs if (steps := steps_to(curve, level)) is not None]
        differences = [a - b for a, b in zip(final[name], final["RoPE"], strict=True)]
        row = {
            "encoding": name,
            "final_loss": spread(final[name], 4),
            "to_rope": spread(differences, 4),
            "level": round(level, 4),
            "steps_to_level": spread(reached, 1) if reached else None,
            "seeds_that_reach_it": len(reached),
            "cache_shifts": ENCODINGS[name](Plan().config()).shifts,
        }
        for length, of_encoding in measured.items():
            for what, values in of_encoding[SAME_COST.get(name, name)].items():
                low, middle, high = statistics.quantiles(values, n=4)
                row[f"{what}_{length}"] = [round(v, 3) for v in (middle, low, high)]
        rows.append(row)
    return sorted(rows, key=lambda row: row["final_loss"][0])


def _with_spread(values: Sequence[float] | None, form: str) -> str:
    if values is None:
        return "never"
    middle, low, high = (format(value, form) for value in values)
    return f"{middle} ({low} to {high})"


def table(document: Mapping[str, Any]) -> str:
    """Markdown: what was learned, then what it cost."""
    rows, plan, seeds = document["summary"], document["plan"], len(document["seeds"])
    lines = [
        f"{plan['num_layers']} layers, {plan['hidden_size']} wide, "
        f"{document['parameters'] / 1e6:.2f} million parameters, a vocabulary of "
        f"{plan['vocab_size']:,}; {plan['steps']} steps of {plan['batch_tokens']:,} tokens, "
        f"windows of {plan['length']}, peak learning rate {plan['learning_rate']:g}. Held-out "
        f"loss in nats per token; mean of {seeds} seeds (least to most). "
        f"The level, {rows[0]['level']:.3f}, is where {BASELINE} ends.",
        "",
        "| encoding | loss at the end | minus RoPE's, same seed | steps to the level "
        "| seeds that reach it | cache outlives its oldest tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["encoding"],
            _with_spread(row["final_loss"], ".3f"),
            _with_spread(row["to_rope"], "+.3f"),
            _with_spread(row["steps_to_level"], ".0f"),
            str(row["seeds_that_reach_it"]),
            "yes" if row["cache_shifts"] else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lengths = list(document["times"])
    heads = [f"{what}, {n}" for n in lengths for what in ("training step", "decoded token")]
    lines += [
        "",
        f"Milliseconds on {document['machine']['threads']} thread: a training step of "
        f"{plan['batch_tokens']:,} tokens in windows of so many, and a token decoded behind as "
        "many; median (quartiles).",
        "",
        f"| encoding | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    for row in rows:
        cells = [row["encoding"]]
        for length in lengths:
            cells.append(_with_spread(row[f"train_step_ms_{length}"], ".0f"))
            cells.append(_with_spread(row[f"decode_ms_{length}"], ".2f"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def panels(curves: Mapping[str, Sequence[HeldOut]]) -> list[Panel]:
    """Held-out losses, and what they are above RoPE's of the same seed."""
    at = sorted(curves["RoPE"][0])
    losses = {name: [[run[step] for step in at] for run in runs] for name, runs in curves.items()}
    above = {
        name: [
            [a - b for a, b in zip(run, rope, strict=True)]
            for run, rope in zip(runs, losses["RoPE"], strict=True)
        ]
        for name, runs in losses.items()
    }
    late = [value for runs in losses.values() for run in runs for value in run[len(at) // 5 :]]
    first, second = (
        {name: Curve(at, runs) for name, runs in each.items()} for each in (losses, above)
    )
    title = f"{len(losses['RoPE'])} seeds: mean, least to most"
    low, high = min(late) - 0.05, max(late)
    return [
        Panel(title, "steps", "held-out loss, nats per token", first, low, high),
        Panel("difference to RoPE, same seed", "steps", "nats per token", second),
    ]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.positions")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="text")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run for each")
    parser.add_argument("--hidden-size", type=int, default=Plan.hidden_size, help="width")
    parser.add_argument("--length", type=int, default=Plan.length, help="tokens of a window")
    parser.add_argument("--vocab-size", type=int, default=Plan.vocab_size, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate, help="its peak")
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=[*ENCODINGS])
    parser.add_argument("--rounds", type=int, default=10, help="repetitions of what is timed")
    parser.add_argument("--only", choices=("runs", "times"), help="a part, and no results yet")
    options = parser.parse_args(arguments)
    if missing := {"RoPE", BASELINE} - set(options.encodings):
        parser.error(f"--encodings must have {missing.pop()}: the others are compared with it")
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles; got {options.rounds}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = _arguments(arguments)
    plan = Plan(
        steps=options.steps,
        hidden_size=options.hidden_size,
        length=options.length,
        vocab_size=options.vocab_size,
        learning_rate=options.learning_rate,
    )
    laboratory = Laboratory(options.corpus, options.work, plan)
    timed = options.work / "times.json"
    if options.only != "runs" and (options.only == "times" or not timed.exists()):
        lengths = (plan.length, 4 * plan.length)
        values = times(plan, laboratory.mixture, laboratory.held_out, lengths, options.rounds)
        timed.write_text(json.dumps({"machine": machine(), "times": values}) + "\n", "utf-8")
    if options.only == "times":
        return
    runs = {}
    for seed in options.seeds:
        for name in options.encodings:
            runs[name, seed] = laboratory.run(name, seed, plan)
    if options.only == "runs":
        return
    curves = {
        name: [
            {int(step): loss for step, loss in runs[name, seed]["held_out"].items()}
            for seed in options.seeds
        ]
        for name in options.encodings
    }
    measured = json.loads(timed.read_text(encoding="utf-8"))
    document = {
        "machine": measured["machine"],
        "plan": asdict(plan),
        "seeds": options.seeds,
        "parameters": sum(p.numel() for p in Run("none", 1, plan).model.parameters()),
        "summary": summarise(curves, measured["times"]),
        "held_out": curves,
        "times": measured["times"],
    }
    write(options.out, "positions", document, panels(curves))
    print(table(document))


if __name__ == "__main__":
    main()
