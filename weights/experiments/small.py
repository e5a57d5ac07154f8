"""A small network trained under an encoding, and what was measured of it, kept in a work folder.

work/tokenizer/           the vocabulary, trained on the corpus
work/tokens/              token files, train/ and heldout/
work/runs/NAME.json       a run that has ended: its plan and its losses
work/models/NAME/         a model directory, of those encodings that the engine serves
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from tqdm import tqdm

from engine.config import ModelConfig
from engine.errors import ConfigError
from weights.corpus.tokens import Mixture, Tokens, open_tokens
from weights.experiments.encodings import ENCODINGS, EncodedAttention, EncodedGPT2, with_xpos
from weights.training.export import export_weights
from weights.training.loss import head_loss
from weights.training.optimizer import Optimizer, Schedule
from weights.training.prepare import prepare
from weights.training.recipe import OptimizerKind, Recipe, TrainingConfig
from weights.training.train import initialise

SERVED = ("RoPE", "xPos")
"""Encodings that the engine serves: their weights are kept."""


@dataclass(frozen=True)
class Plan:
    """What every run of an experiment is given.

    length: tokens of a window; batch_tokens: of a step. learning_rate: the peak, after a warm-up of
    a twentieth of the steps and before half a cosine to 0. evaluate_every: steps.
    """

    vocab_size: int = 1024
    num_layers: int = 4
    num_heads: int = 4
    hidden_size: int = 128
    length: int = 256
    batch_tokens: int = 2048
    steps: int = 600
    optimizer: OptimizerKind = "adamw"
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    evaluate_every: int = 30
    held_out_windows: int = 64

    def config(self) -> ModelConfig:
        """The network; all of a head is rotated where anything is."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            padded_vocab_size=self.vocab_size,
            eos_token_id=self.vocab_size - 1,
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

    def __init__(self, name: str, seed: int, plan: Plan) -> None:
        config = plan.config()
        self.plan = plan
        self.model = EncodedGPT2(config, ENCODINGS[name](config))
        initialise(self.model.network, seed)
        self.model.encoding.initialise(seed)
        recipe = Recipe(steps=plan.steps, schedule="cosine", warmup=max(1, plan.steps // 20))
        self.schedule = Schedule.of(recipe)
        self.optimizer = Optimizer(
            self.model, plan.learning_rate, plan.weight_decay, plan.optimizer
        )
        self.attention = EncodedAttention(self.model.encoding)

    def loss(self, token_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Nats per token."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model(token_ids, self.attention)
        return head_loss(hidden, self.model.network.head.weight, targets, torch.bfloat16)

    def train_step(self, step: int, mixture: Mixture) -> float:
        """The loss before the step."""
        rows = max(1, self.plan.batch_tokens // self.plan.length)
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
        """All steps. loss: by step; held_out: by steps done; step_ms: processor time of each."""
        held_out: dict[int, float] = {0: self.measure(block)}
        losses, cpu = [], []
        for step in tqdm(range(self.plan.steps), desc=label, unit=" steps", mininterval=5):
            began = time.process_time()
            losses.append(self.train_step(step, mixture))
            cpu.append(time.process_time() - began)
            if (step + 1) % self.plan.evaluate_every == 0 or step + 1 == self.plan.steps:
                held_out[step + 1] = self.measure(block)
        return {
            "loss": [round(loss, 4) for loss in losses],
            "held_out": {step: round(loss, 5) for step, loss in held_out.items()},
            "step_ms": [round(1000 * seconds, 1) for seconds in cpu],
        }


def slug(name: str) -> str:
    """A name as part of a file's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def model_dir(work: Path, name: str, seed: int) -> Path:
    """Where the model of a run under an encoding of SERVED is kept."""
    return work / "models" / slug(_label(name, seed))


def _label(title: str, seed: int) -> str:
    return f"{title}, seed {seed}"


class Laboratory:
    """A work folder: text as tokens, and the runs that have ended."""

    def __init__(self, corpus: Path, work: Path, plan: Plan) -> None:
        self.work = work
        config = TrainingConfig(recipe=Recipe(steps=1), vocab_size=plan.vocab_size)
        tokens = prepare(corpus, work / "tokenizer", work, config, Console(stderr=True))
        self.sources = open_tokens(tokens / "train")
        self.held_out = open_tokens(tokens / "heldout")

    def mixture(self, seed: int) -> Mixture:
        """Sources by size."""
        shares = {name: float(len(tokens)) for name, tokens in self.sources.items()}
        return Mixture(self.sources, shares, seed)

    def run(self, name: str, seed: int, plan: Plan, title: str | None = None) -> dict[str, Any]:
        """What Run.train gives, now or of a run that has ended. title: by default the encoding.

        Raises ConfigError where the folder has it of another plan.
        """
        label = _label(title or name, seed)
        path = self.work / "runs" / f"{slug(label)}.json"
        wanted = {"encoding": name, "seed": seed, "plan": asdict(plan)}
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if kept["of"] != wanted:
                raise ConfigError(
                    f"{path} is of another plan: choose another --work, or remove it\n"
                    f"it has {kept['of']}\nwanted  {wanted}"
                )
            return kept
        run = Run(name, seed, plan)
        result = run.train(self.mixture(seed), held_out_block(self.held_out, plan), label)
        if name in SERVED and title is None:
            self.keep(run, name, model_dir(self.work, name, seed))
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {"of": wanted, **result}
        path.write_text(json.dumps(document) + "\n", encoding="utf-8")
        return dict(json.loads(json.dumps(document)))

    def keep(self, run: Run, name: str, folder: Path) -> None:
        """Write a model directory that the engine serves; bfloat16."""
        config = run.plan.config()
        served = with_xpos(config) if name == "xPos" else config
        state = run.model.network.state_dict()
        export_weights({"config": served.to_dict(), "model": state}, folder)
        for path in (self.work / "tokenizer").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
