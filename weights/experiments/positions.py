"""Does RoPE learn faster, cost less than a bias, and keep the cache valid?

    python -m weights.experiments.positions --tokens DIR --out DIR

Trains the same small network under every encoding of weights.experiments.encodings: the same text,
batches, steps and seeds. Writes positions.json, positions.png and positions.md. DIR is the
`tokens` folder of a run directory, with train/ and heldout/. A run that was stopped goes on with
the pairs of encoding and seed that are missing.

Time per training step and per decoded token are medians of interleaved repetitions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine.config import ModelConfig
from weights.curve import smooth
from weights.experiments.encodings import ENCODINGS, EncodedAttention, EncodedGPT2
from weights.experiments.picture import draw_curves
from weights.loss import head_loss
from weights.optimizer import Optimizer, Schedule
from weights.recipe import Recipe
from weights.tokens import Mixture, Tokens, open_tokens
from weights.train import initialise


@dataclass(frozen=True)
class Plan:
    """What every encoding is given."""

    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    length: int = 256
    batch_tokens: int = 4096
    steps: int = 400
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (1, 2, 3)
    evaluate_every: int = 20
    held_out_windows: int = 32

    def config(self, vocab_size: int) -> ModelConfig:
        """The network; all of a head is rotated where anything is."""
        return ModelConfig(
            vocab_size=vocab_size,
            padded_vocab_size=vocab_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            max_position=self.length,
            rotary_dim=self.hidden_size // self.num_heads,
            activation="gelu_tanh",
        )


def held_out_block(held_out: Mapping[str, Tokens], plan: Plan) -> torch.Tensor:
    """Windows spread evenly over the held-out sources, int64 [windows, length + 1]."""
    rows = []
    each = max(1, plan.held_out_windows // len(held_out))
    for tokens in held_out.values():
        stride = max(1, (len(tokens) - plan.length - 1) // each)
        for start in range(0, stride * each, stride):
            rows.append(torch.from_numpy(tokens[start : start + plan.length + 1].astype("int64")))
    return torch.stack(rows)


class Run:
    """One encoding, one seed."""

    def __init__(self, name: str, seed: int, plan: Plan, vocab_size: int) -> None:
        config = plan.config(vocab_size)
        self.plan = plan
        self.model = EncodedGPT2(config, ENCODINGS[name](config))
        initialise(self.model.network, seed)
        recipe = Recipe(steps=plan.steps, schedule="cosine", warmup=max(1, plan.steps // 20))
        self.schedule = Schedule.of(recipe)
        self.optimizer = Optimizer(self.model, plan.learning_rate, kind="adamw")
        self.attention = EncodedAttention(self.model.encoding)

    def loss(self, token_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats per token."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(token_ids, self.attention)
        return head_loss(hidden, self.model.network.head.weight, targets, torch.bfloat16)

    def train_step(self, step: int, mixture: Mixture) -> float:
        """The loss before the step."""
        rows = self.plan.batch_tokens // self.plan.length
        loss = self.loss(*mixture.batch(step, rows, self.plan.length))
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(self.schedule.scale(step))
        return loss.item()

    @torch.no_grad()
    def measure(self, block: torch.Tensor) -> float:
        """Held-out nats per token."""
        return self.loss(block[:, :-1], block[:, 1:]).item()

    def train(self, mixture: Mixture, block: torch.Tensor, label: str) -> dict[str, Any]:
        """All steps; held-out losses by step."""
        held_out: dict[int, float] = {0: self.measure(block)}
        losses = []
        for step in tqdm(range(self.plan.steps), desc=label, unit=" steps", mininterval=5):
            losses.append(self.train_step(step, mixture))
            if (step + 1) % self.plan.evaluate_every == 0 or step + 1 == self.plan.steps:
                held_out[step + 1] = self.measure(block)
        return {"loss": [round(loss, 5) for loss in losses], "held_out": held_out}


@torch.no_grad()
def decode_seconds(run: Run, prompt: torch.Tensor, repeats: int) -> list[float]:
    """Seconds per token, one sequence, float32, with the cache nearly full.

    prompt: int64 [1, length - repeats]
    """
    attention = EncodedAttention(run.model.encoding, cached=True)
    hidden = run.model(prompt, attention)[:, -1:]
    seconds = []
    for _ in range(repeats):
        token = run.model.network.logits(hidden).argmax(-1)
        began = time.perf_counter()
        hidden = run.model(token, attention)
        seconds.append(time.perf_counter() - began)
    return seconds


def times(plan: Plan, mixture: Mixture, block: torch.Tensor, vocab_size: int) -> dict[str, Any]:
    """Milliseconds per training step and per decoded token, encodings taking turns."""
    runs = {name: Run(name, 1, plan, vocab_size) for name in ENCODINGS}
    training: dict[str, list[float]] = {name: [] for name in runs}
    decoding: dict[str, list[float]] = {name: [] for name in runs}
    tokens = min(32, plan.length // 4)
    for repeat in tqdm(range(8), desc="times", unit=" rounds"):
        for name, run in runs.items():
            began = time.perf_counter()
            run.train_step(repeat, mixture)
            training[name].append(time.perf_counter() - began)
            decoding[name] += decode_seconds(run, block[:1, : plan.length - tokens], tokens)
    return {
        name: {
            "train_step_ms": [round(1000 * s, 2) for s in training[name][2:]],
            "decode_ms": [round(1000 * s, 4) for s in decoding[name][2 * tokens :]],
            "cache_shifts": run.model.encoding.shifts,
        }
        for name, run in runs.items()
    }


def steps_to(held_out: Mapping[int, float], level: float) -> float | None:
    """The step at which a curve first reaches a loss, on straight lines between measurements."""
    before: tuple[int, float] | None = None
    for step, loss in sorted(held_out.items()):
        if loss <= level:
            if before is None or before[1] == loss:
                return float(step)
            return before[0] + (before[1] - level) / (before[1] - loss) * (step - before[0])
        before = step, loss
    return None


def summarise(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per encoding. The loss to reach is the worst encoding's mean at the end."""
    plan = results["plan"]
    curves = {
        name: [{int(k): v for k, v in run["held_out"].items()} for run in seeds.values()]
        for name, seeds in results["runs"].items()
    }
    final = {name: [curve[plan["steps"]] for curve in runs] for name, runs in curves.items()}
    level = max(statistics.mean(losses) for losses in final.values())
    rows = []
    for name, runs in curves.items():
        reached = [steps for curve in runs if (steps := steps_to(curve, level)) is not None]
        measured = results["times"][name]
        rows.append(
            {
                "encoding": name,
                "final_loss": round(statistics.mean(final[name]), 4),
                "final_loss_least": min(final[name]),
                "final_loss_most": max(final[name]),
                "level": round(level, 4),
                "steps_to_level": round(statistics.mean(reached)) if reached else None,
                "seeds_that_reach_it": len(reached),
                "train_step_ms": statistics.median(measured["train_step_ms"]),
                "decode_ms": statistics.median(measured["decode_ms"]),
                "cache_shifts": measured["cache_shifts"],
            }
        )
    return sorted(rows, key=lambda row: row["final_loss"])


def table(rows: Sequence[Mapping[str, Any]], plan: Mapping[str, Any], parameters: int) -> str:
    """Markdown."""
    lines = [
        f"{plan['num_layers']} layers, {plan['hidden_size']} wide, {parameters / 1e6:.1f} million "
        f"parameters; {plan['steps']} steps of {plan['batch_tokens']:,} tokens, windows of "
        f"{plan['length']}; {len(plan['seeds'])} seeds: mean (least to most). Held-out loss in "
        f"nats per token; the level is the worst encoding's loss at the end, "
        f"{rows[0]['level']:.3f}.",
        "",
        "| encoding | loss at the end | steps to the level | ms per training step "
        "| ms per decoded token | cache outlives its oldest tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = "never" if row["steps_to_level"] is None else f"{row['steps_to_level']}"
        lines.append(
            f"| {row['encoding']} | {row['final_loss']:.3f} ({row['final_loss_least']:.3f} to "
            f"{row['final_loss_most']:.3f}) | {steps} | {row['train_step_ms']:.0f} "
            f"| {row['decode_ms']:.2f} | {'yes' if row['cache_shifts'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.experiments.positions")
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tokens", type=Path, required=True, help="folder of train/ and heldout/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each encoding")
    parser.add_argument("--hidden-size", type=int, default=Plan.hidden_size, help="width")
    parser.add_argument("--length", type=int, default=Plan.length, help="tokens of a window")
    options = parser.parse_args(arguments)
    plan = Plan(
        steps=options.steps,
        seeds=tuple(range(1, options.seeds + 1)),
        hidden_size=options.hidden_size,
        length=options.length,
    )
    sources = open_tokens(options.tokens / "train")
    vocab_size = 1 + max(int(tokens.max()) for tokens in sources.values())
    block = held_out_block(open_tokens(options.tokens / "heldout"), plan)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "positions.json"
    wanted = json.loads(json.dumps(asdict(plan)))
    results: dict[str, Any] = {"plan": wanted, "runs": {}}
    if path.exists() and (before := json.loads(path.read_text("utf-8")))["plan"] == wanted:
        results = before
    shares = {name: float(len(tokens)) for name, tokens in sources.items()}
    for seed in plan.seeds:
        mixture = Mixture(sources, shares, seed)
        for name in ENCODINGS:
            runs = results["runs"].setdefault(name, {})
            if str(seed) not in runs:
                run = Run(name, seed, plan, vocab_size)
                runs[str(seed)] = run.train(mixture, block, f"{name}, seed {seed}")
                path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    if "times" not in results:
        results["times"] = times(plan, Mixture(sources, shares, 1), block, vocab_size)
    results["summary"] = summarise(results)
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    first = Run("RoPE", 1, plan, vocab_size)
    parameters = sum(p.numel() for p in first.model.network.parameters())
    text = table(results["summary"], wanted, parameters)
    (options.out / "positions.md").write_text(text, encoding="utf-8")
    print(text)
    curves = {
        name: [smooth(run["loss"]) for run in runs.values()]
        for name, runs in results["runs"].items()
    }
    draw_curves(curves, options.out / "positions.png", "steps", "training loss, nats per token")


if __name__ == "__main__":
    main()
