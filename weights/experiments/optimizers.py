"""AdamW or Muon? The same small network under both, each at its own best learning rate.

    python -m weights.experiments.optimizers --corpus DIR --work DIR --out DIR

First one seed at several learning rates, doubled or halved further until the best is no edge.
Then three seeds at the best, twice: in equal steps, and in equal time, where AdamW gets as many
more steps (and a schedule as much longer) as its steps are shorter. The work folder may be that of
weights.experiments.positions; what was stopped goes on. Writes optimizers.json and
optimizers.svg, and prints tables.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, get_args

from weights.experiments.picture import Curve, Panel
from weights.experiments.positions import spread
from weights.experiments.results import machine, write
from weights.experiments.search import best_number
from weights.experiments.small import Laboratory, Plan
from weights.training.recipe import OptimizerKind

ENCODING = "RoPE"
RATES = (2e-3, 4e-3, 8e-3)


def last(run: Mapping[str, Any]) -> float:
    """Held-out loss at the end."""
    return float(run["held_out"][str(run["of"]["plan"]["steps"])])


def step_ms(run: Mapping[str, Any]) -> float:
    """Processor milliseconds of a step, the median: robust to what else ran."""
    return float(statistics.median(run["step_ms"]))


class Runs(Protocol):
    """What a laboratory has."""

    def run(self, name: str, seed: int, plan: Plan, title: str | None = None) -> dict[str, Any]:
        """Of an encoding and a seed, now or before."""


class Comparison:
    """Runs of a laboratory by optimizer, learning rate, steps and seed."""

    def __init__(self, laboratory: Runs, plan: Plan) -> None:
        self.laboratory = laboratory
        self.plan = plan

    def run(self, kind: OptimizerKind, rate: float, seed: int, steps: int) -> dict[str, Any]:
        """Now or before."""
        plan = replace(self.plan, optimizer=kind, learning_rate=rate, steps=steps)
        return self.laboratory.run(ENCODING, seed, plan, f"{kind}, {rate:g}, {steps} steps")

    def search(self, kind: OptimizerKind) -> dict[float, float]:
        """Last losses by learning rate, with the first seed."""

        def measure(rate: float) -> float:
            return last(self.run(kind, rate, 1, self.plan.steps))

        losses = {rate: measure(rate) for rate in RATES}
        best_number(losses, measure)
        return dict(sorted(losses.items()))


def table(document: Mapping[str, Any]) -> str:
    """Markdown."""
    plan, rows = document["plan"], document["summary"]
    lines = [
        f"{plan['num_layers']} layers, {plan['hidden_size']} wide, {ENCODING}, steps of "
        f"{plan['batch_tokens']:,} tokens; {len(document['seeds'])} seeds: mean (least to most). "
        "Held-out loss in nats per token; a step in processor milliseconds, median.",
        "",
        "| optimizer | peak learning rate | steps | ms per step | loss at the end |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        mean, least, most = row["final_loss"]
        lines.append(
            f"| {row['optimizer']} | {row['rate']:g} | {row['steps']} | {row['step_ms']:.0f} | "
            f"{mean:.3f} ({least:.3f} to {most:.3f}) |"
        )
    rates = sorted({float(rate) for losses in document["search"].values() for rate in losses})
    lines += [
        "",
        f"Loss after {plan['steps']} steps by peak learning rate, one seed:",
        "",
        f"| | {' | '.join(f'{rate:g}' for rate in rates)} |",
        "|---" * (1 + len(rates)) + "|",
    ]
    for kind, losses in document["search"].items():
        cells = [f"{losses[f'{rate:g}']:.3f}" if f"{rate:g}" in losses else "" for rate in rates]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _held_out(runs: Sequence[Mapping[str, Any]]) -> list[dict[int, float]]:
    return [{int(step): loss for step, loss in run["held_out"].items()} for run in runs]


def compare(comparison: Comparison, seeds: Sequence[int]) -> dict[str, Any]:
    """The search, then both optimizers at equal steps and AdamW at Muon's time."""
    search = {kind: comparison.search(kind) for kind in get_args(OptimizerKind)}
    best = {kind: min(losses, key=losses.__getitem__) for kind, losses in search.items()}
    steps = comparison.plan.steps

    def runs(kind: OptimizerKind, count: int) -> list[dict[str, Any]]:
        return [comparison.run(kind, best[kind], seed, count) for seed in seeds]

    equal = {"muon": runs("muon", steps), "adamw": runs("adamw", steps)}
    cost = {kind: statistics.median(map(step_ms, done)) for kind, done in equal.items()}
    longer = round(steps * cost["muon"] / cost["adamw"])
    rows, curves = [], {}
    for label, kind, done in (
        ("Muon", "muon", equal["muon"]),
        ("AdamW, equal steps", "adamw", equal["adamw"]),
        ("AdamW, equal time", "adamw", runs("adamw", longer)),
    ):
        curves[label] = _held_out(done)
        rows.append(
            {
                "optimizer": label,
                "rate": best[kind],
                "steps": done[0]["of"]["plan"]["steps"],
                "step_ms": cost[kind],
                "final_loss": spread([last(run) for run in done], 4),
            }
        )
    named = {kind: {f"{rate:g}": loss for rate, loss in ls.items()} for kind, ls in search.items()}
    return {"search": named, "summary": rows, "held_out": curves}


def panels(document: Mapping[str, Any]) -> list[Panel]:
    """Held-out losses against processor time, the starts left out."""
    curves = {}
    for row in document["summary"]:
        held_out = document["held_out"][row["optimizer"]]
        steps = [step for step in held_out[0] if step >= row["steps"] / 10]
        at = [step * row["step_ms"] / 1000 for step in steps]
        runs = [[run[step] for step in steps] for run in held_out]
        curves[f"{row['optimizer']}, {row['steps']} steps"] = Curve(at, runs)
    title = f"{len(document['seeds'])} seeds: mean, least to most"
    return [Panel(title, "processor seconds", "held-out loss, nats per token", curves)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.optimizers")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--corpus", type=Path, required=True, help="text")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a run for each")
    parser.add_argument("--hidden-size", type=int, default=Plan.hidden_size, help="width")
    parser.add_argument("--length", type=int, default=Plan.length, help="tokens of a window")
    parser.add_argument("--vocab-size", type=int, default=Plan.vocab_size, help="tokens")
    options = parser.parse_args(arguments)
    plan = Plan(
        steps=options.steps,
        hidden_size=options.hidden_size,
        length=options.length,
        vocab_size=options.vocab_size,
    )
    laboratory = Laboratory(options.corpus, options.work, plan)
    document = {
        "machine": machine(),
        "plan": asdict(plan),
        "seeds": options.seeds,
        **compare(Comparison(laboratory, plan), options.seeds),
    }
    write(options.out, "optimizers", document, panels(document))
    print(table(document))


if __name__ == "__main__":
    main()
