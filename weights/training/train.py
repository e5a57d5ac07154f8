"""The training loop: a run is a function of text, network, recipe and the steps done.

Short windows first, whole contexts while the learning rate is low at the end. The run directory
gets ckpt.pt and log.jsonl, a line per step and one per held-out measurement.

    echo 300 > RUN_DIR/end                        # end it in 300 steps, the learning rate at 0
    echo now > RUN_DIR/end                        # end it in as many steps as decay_share says

may be written at any time, and again, to end earlier or later; the file is removed once read.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.attention.base import Attention
from engine.model.gpt2 import GPT2
from engine.model.rope import RotaryTable
from weights.corpus.tokens import Mixture, Tokens
from weights.training.attention import ShortWindowAttention
from weights.training.loss import head_loss
from weights.training.optimizer import Optimizer, Schedule
from weights.training.recipe import Recipe
from weights.training.world import World
from weights.whole import write_whole

CHECKPOINT = "ckpt.pt"
LOG = "log.jsonl"


class Watcher(Protocol):
    """Who is told how a run goes."""

    def stepped(self, values: Mapping[str, Any], end: int | None) -> None:
        """After each step, with what is logged; end: the step it ends before, where known."""

    def measured(self, values: Mapping[str, Any]) -> None:
        """After each held-out measurement."""

    def told(self, message: str) -> None:
        """Anything else."""


def initialise(model: GPT2, seed: int) -> None:
    """GPT-2's: normal, 0.02; what writes into the residual stream is scaled down by its depth."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            into_stream = name.endswith(("out.weight", "down.weight"))
            std = 0.02 / math.sqrt(2 * model.config.num_layers) if into_stream else 0.02
            nn.init.normal_(parameter, std=std, generator=random)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Objective(nn.Module):
    """Token ids and targets -> nats per token, products in bfloat16."""

    def __init__(self, model: GPT2, attention: Attention, *, compiled: bool) -> None:
        super().__init__()
        self.model = model
        self.attention = attention
        self._hidden = torch.compile(model) if compiled else model

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """int64 [rows, length] each -> scalar"""
        with torch.autocast(token_ids.device.type, torch.bfloat16):
            hidden = self._hidden(token_ids, self.attention)
        return head_loss(hidden, self.model.head.weight, targets, torch.bfloat16)


class Trainer:
    """A run: model, optimizer, schedule, and `step`, the next step to compute."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        sources: Mapping[str, Tokens],
        *,
        weights: Mapping[str, float] | None = None,
        world: World | None = None,
        compiled: bool = False,
    ) -> None:
        """weights: share of the tokens by source; by default a source's share is its size.

        Raises ConfigError for a source that is smaller than a window, and for a batch that the
        processes cannot share evenly.
        """
        self.recipe = recipe
        self.world = world or World(torch.device("cpu"))
        self.lengths = recipe.windows(config.max_position)
        for length in self.lengths:
            if self.rows(length) % self.world.size:
                raise ConfigError(
                    f"batch_tokens {recipe.batch_tokens} are {self.rows(length)} windows of "
                    f"{length}, which {self.world.size} processes cannot share evenly"
                )
        shares = weights or {name: float(len(tokens)) for name, tokens in sources.items()}
        for name in shares:
            if shares[name] and len(sources[name]) <= max(self.lengths):
                raise ConfigError(
                    f"source {name} has {len(sources[name]):,} tokens: too few for a window of "
                    f"{max(self.lengths):,}. Next: more text, or a shorter max_position"
                )
        self.model = GPT2(config)
        initialise(self.model, recipe.seed)
        self.model.to(self.world.device)
        self.mixture = Mixture(sources, shares, recipe.seed)
        self.optimizer = Optimizer(
            self.model, recipe.learning_rate, recipe.weight_decay, recipe.optimizer
        )
        self.schedule = Schedule.of(recipe)
        table = RotaryTable.for_model(config).to(self.world.device)
        attention = ShortWindowAttention(table, config.num_heads)
        self.loss = Objective(self.model, attention, compiled=compiled)
        self._shared = self.world.wrap(self.loss)
        self.step = 0
        self.tokens = 0
        self.busy = 0.0  # seconds, of all the runs this one resumes

    def rows(self, length: int) -> int:
        """Windows of a step, over all processes."""
        return max(1, self.recipe.batch_tokens // length)

    def end_in(self, steps: int) -> None:
        """Let the learning rate fall to 0 over the next steps."""
        self.schedule = self.schedule.ending(self.step, steps)

    @property
    def length(self) -> int:
        """Tokens of a window of the next step."""
        decaying = self.schedule.decay_start is not None and self.step >= self.recipe.warmup
        late = decaying and self.schedule.scale(self.step) < self.recipe.long_below
        return self.lengths[late]

    def train_step(self) -> dict[str, float]:
        """One step; what is logged of it."""
        started, clock = time.process_time(), time.monotonic()
        length, device = self.length, self.world.device
        rows = self.rows(length)
        batch = self.mixture.batch(self.step, rows, length)
        mine = (part[self.world.rank :: self.world.size].to(device) for part in batch)
        loss = self._shared(*mine)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        scale = self.schedule.scale(self.step)
        self.optimizer.step(scale)
        self.step += 1
        self.tokens += rows * length
        mean = self.world.mean(loss.detach())
        cpu = (time.process_time() - started) / torch.get_num_threads()
        self.busy += cpu if device.type == "cpu" else time.monotonic() - clock
        return {"loss": mean, "norm": norm.item(), "scale": scale, "length": length}

    @torch.no_grad()
    def held_out_loss(self, tokens: Tokens, windows: int) -> float:
        """Nats per token over evenly spaced windows of the present length."""
        length = min(self.length, len(tokens) - 1)
        starts = range(0, len(tokens) - length, max(1, (len(tokens) - length) // windows))
        rows = [torch.from_numpy(tokens[s : s + length + 1].astype("int64")) for s in starts]
        block = torch.stack(rows[:windows]).to(self.world.device)
        nats: float = self.loss(block[:, :-1].contiguous(), block[:, 1:].contiguous()).item()
        return nats

    def checkpoint(self) -> dict[str, Any]:
        """Everything that restore() needs, and what is exported."""
        return {
            "config": self.model.config.to_dict(),
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": asdict(self.schedule),
            "step": self.step,
            "tokens": self.tokens,
            "busy": self.busy,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all. Raises OSError."""
        content = io.BytesIO()
        torch.save(self.checkpoint(), content)
        write_whole(path, content.getbuffer())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's content: the same losses as if it had never stopped.

        Raises ConfigError where it is of another network, or where the end that is asked for comes
        too late to be heard of.
        """
        schedule = Schedule(**state["schedule"])
        for name in ("steps", "minutes"):
            old, new = state["recipe"][name], getattr(self.recipe, name)
            if schedule.decay_start is not None and old != new:
                raise ConfigError(
                    f"{name} is {new}, and was {old} when the learning rate began to fall, at step "
                    f"{schedule.decay_start:,}, to its end at step {schedule.end:,}. Next: leave "
                    f"{name} as it was; before it has ended, the file `end` moves the end"
                )
        config = self.model.config.to_dict()
        for name, value in state["config"].items():
            if value != config[name]:
                raise ConfigError(
                    f"the checkpoint's {name} is {value}, and {config[name]} is asked for"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule = schedule
        self.step, self.tokens, self.busy = state["step"], state["tokens"], state["busy"]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What Trainer.save wrote. Raises ConfigError where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read as a checkpoint: {error}") from error
    return state


def trim_log(path: Path, step: int) -> None:
    """Forget what was logged after a step: a run that goes on from there says it again.

    So a log has every step once, also after a kill, which may cut its last line.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    write_whole(path, "".join(kept).encode())


def end_asked_for(out: Path, trainer: Trainer, watcher: Watcher) -> int | None:
    """Steps in which to end, where that is asked for now: by RUN_DIR/end, by minutes, by steps."""
    recipe, request = trainer.recipe, out / "end"
    decay = max(1, round(trainer.step * recipe.decay_steps_per_step))
    if request.exists() and (text := request.read_text(encoding="utf-8").strip()):
        request.unlink()
        if text.isdecimal() and int(text) > 0:
            return int(text)
        if text == "now":
            return decay
        watcher.told(f"{request} must be a number of steps, at least 1, or `now`; got {text!r}")
    if trainer.schedule.decay_start is not None:
        return None
    before = 1 - recipe.decay_share
    if recipe.minutes is not None and trainer.busy >= 60 * recipe.minutes * before:
        return decay
    if recipe.steps is not None and trainer.step >= round(recipe.steps * before):
        return max(1, recipe.steps - trainer.step)
    return None


def run(
    trainer: Trainer,
    out: Path,
    held_out: Mapping[str, Tokens],
    watcher: Watcher,
    saved: Callable[[], None],
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Train until the decay is over, logging each step, measuring and saving now and then.

    saved: called after each checkpoint. stopping: whether to stop after this step; a checkpoint is
    left then. In a world of several only the first process writes, and is asked. True where the
    run has come to its end. Raises ConfigError where the loss is no number any more, and OSError.
    """
    recipe, leads = trainer.recipe, trainer.world.leads
    last = time.monotonic()
    with (out / LOG).open("a", encoding="utf-8") as log:

        def write(**values: Any) -> dict[str, Any]:
            seen = {"step": trainer.step, "tokens": trainer.tokens, "busy": round(trainer.busy, 2)}
            if leads:
                print(json.dumps(values | seen), file=log, flush=True)
            return values | seen

        def save() -> None:
            if leads:
                trainer.save(out / CHECKPOINT)
                saved()

        while not trainer.schedule.finished(trainer.step):
            if trainer.world.agree(1 if leads and stopping() else None):
                save()
                return False
            steps = trainer.world.agree(end_asked_for(out, trainer, watcher) if leads else None)
            if steps is not None:
                trainer.end_in(steps)
                watcher.told(f"step {trainer.step:,}: ends in {steps:,} steps")
            values = trainer.train_step()
            if not math.isfinite(values["loss"]):
                raise ConfigError(
                    f"the loss is {values['loss']} after step {trainer.step:,}: learning_rate must "
                    f"be lower than {recipe.learning_rate:g}, in all likelihood. Next: another "
                    "model directory, and a lower one"
                )
            watcher.stepped(write(**values), trainer.schedule.end)
            if trainer.step % recipe.evaluate_every == 0 and held_out:
                losses = {name: trainer.held_out_loss(t, 16) for name, t in held_out.items()}
                watcher.measured(write(held_out=losses))
            if time.monotonic() - last > recipe.save_seconds:
                save()
                last = time.monotonic()
    save()
    return True
