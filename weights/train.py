"""Train a RoPE GPT-2 on token files.

    python -m weights.train --tokens DIR --model MODEL_DIR --out RUN_DIR --minutes 80
    python -m weights.train ... --resume          # go on from RUN_DIR/ckpt.pt, exactly
    echo 300 > RUN_DIR/end                        # end it in 300 steps, the learning rate at 0

Short windows first, whole contexts while the learning rate is low at the end. RUN_DIR gets ckpt.pt
and log.jsonl, a line per step and one per held-out measurement. The file RUN_DIR/end may be written
again, to end earlier or later; it is removed once read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine.config import ModelConfig
from engine.model.gpt2 import GPT2
from engine.model.rope import RotaryTable
from weights.attention import ShortWindowAttention
from weights.loss import head_loss
from weights.optimizer import Optimizer, Schedule
from weights.tokens import Mixture, Tokens, open_tokens

# Share of the tokens seen. The books are read about three times, Wikipedia not once to its end.
MIXTURE: Mapping[str, float] = MappingProxyType(
    {
        "austen": 0.30,
        "moby_dick": 0.10,
        "tales": 0.05,
        "shakespeare": 0.05,
        "speeches": 0.05,
        "wikipedia": 0.45,
    }
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run computes.

    batch_tokens: tokens of a step.
    length, long_length: tokens of a window; the long ones come when the learning rate, decaying,
    has fallen below long_below of its peak: by then they are a fifth of the steps or so.
    minutes: busy minutes (processor time over threads) until the decay; steps: the same in steps.
    Whichever comes first starts it; None is never. decay_steps: how long it takes.
    """

    batch_tokens: int = 4096
    length: int = 256
    long_length: int = 1024
    long_below: float = 0.25
    learning_rate: float = 3e-3
    warmup: int = 100
    decay_steps: int = 500
    minutes: float | None = None
    steps: int | None = None
    clip: float = 1.0
    seed: int = 1


def default_config(vocab_size: int) -> ModelConfig:
    """The default model: 10.0 million parameters."""
    return ModelConfig(
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        num_layers=6,
        num_heads=5,
        hidden_size=320,
        intermediate_size=1280,
        max_position=1024,
        rotary_dim=32,
        activation="gelu_tanh",
        eos_token_id=vocab_size - 1,
    )


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


class Trainer:
    """A run: model, optimizer, schedule, and `step`, the next step to compute."""

    def __init__(
        self,
        config: ModelConfig,
        recipe: Recipe,
        sources: dict[str, Tokens],
        *,
        device: str = "cpu",
        compiled: bool = False,
    ) -> None:
        weights = {name: share for name, share in MIXTURE.items() if name in sources}
        self.recipe = recipe
        self.device = torch.device(device)
        self.model = GPT2(config)
        initialise(self.model, recipe.seed)
        self.model.to(self.device)
        self.mixture = Mixture(sources, weights or dict.fromkeys(sources, 1.0), recipe.seed)
        self.optimizer = Optimizer(self.model, recipe.learning_rate)
        self.schedule = Schedule(recipe.warmup)
        table = RotaryTable.for_model(config).to(self.device)
        self.attention = ShortWindowAttention(table, config.num_heads)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.step = 0
        self.tokens = 0
        self.busy = 0.0  # seconds of processor time over threads, of all the runs this one resumes

    def end_in(self, steps: int) -> None:
        """Let the learning rate fall to 0 over the next steps."""
        self.schedule = self.schedule.ending(self.step, steps)

    @property
    def length(self) -> int:
        """Tokens of a window at the next step."""
        decaying = self.schedule.decay_start is not None
        late = decaying and self.schedule.scale(self.step) < self.recipe.long_below
        return self.recipe.long_length if late else self.recipe.length

    def loss(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        """Nats per token; int64 [rows, length] each."""
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden = self.forward(token_ids.to(self.device), self.attention)
        targets = targets.to(self.device)
        return head_loss(hidden, self.model.head.weight, targets, torch.bfloat16)

    def train_step(self) -> dict[str, float]:
        """One step; what is logged of it."""
        started = time.process_time()
        length = self.length
        rows = max(1, self.recipe.batch_tokens // length)
        loss = self.loss(*self.mixture.batch(self.step, rows, length))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        scale = self.schedule.scale(self.step)
        self.optimizer.step(scale)
        self.step += 1
        self.tokens += rows * length
        self.busy += (time.process_time() - started) / torch.get_num_threads()
        return {"loss": loss.item(), "norm": norm.item(), "scale": scale, "length": length}

    @torch.no_grad()
    def held_out_loss(self, tokens: Tokens, windows: int) -> float:
        """Nats per token over evenly spaced windows of the present length."""
        length = self.length
        starts = range(0, len(tokens) - length - 1, max(1, (len(tokens) - length - 1) // windows))
        rows = [torch.from_numpy(tokens[s : s + length + 1].astype("int64")) for s in starts]
        block = torch.stack(rows[:windows])
        return self.loss(block[:, :-1].contiguous(), block[:, 1:].contiguous()).item()

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        partial = path.with_suffix(".partial")
        state = {
            "config": self.model.config.to_dict(),
            "recipe": asdict(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": asdict(self.schedule),
            "step": self.step,
            "tokens": self.tokens,
            "busy": self.busy,
        }
        torch.save(state, partial)
        partial.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's content: the same losses as if it had never stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule = Schedule(**state["schedule"])
        self.step, self.tokens, self.busy = state["step"], state["tokens"], state["busy"]


def end_asked_for(out: Path, trainer: Trainer) -> int | None:
    """Steps in which to end, where that is asked for now: by RUN_DIR/end, by minutes, by steps."""
    recipe, request = trainer.recipe, out / "end"
    if request.exists() and (text := request.read_text(encoding="utf-8").strip()):
        request.unlink()
        return int(text) if text.isdigit() else recipe.decay_steps
    if trainer.schedule.decay_start is not None:
        return None
    if recipe.minutes is not None and trainer.busy >= 60 * recipe.minutes:
        return recipe.decay_steps
    if recipe.steps is not None and trainer.step >= recipe.steps:
        return recipe.decay_steps
    return None


def run(
    trainer: Trainer, out: Path, held_out: dict[str, Tokens], every: int, save_seconds: float
) -> None:
    """Train until the decay is over, logging each step and saving now and then."""
    saved = time.monotonic()
    with (
        (out / "log.jsonl").open("a", encoding="utf-8") as log,
        tqdm(initial=trainer.step, unit=" steps") as bar,
    ):

        def write(**values: Any) -> None:
            values |= {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "busy": round(trainer.busy, 2),
            }
            print(json.dumps(values), file=log, flush=True)

        while not trainer.schedule.finished(trainer.step):
            if (steps := end_asked_for(out, trainer)) is not None:
                trainer.end_in(steps)
                bar.write(f"step {trainer.step}: ends in {steps} steps")
            values = trainer.train_step()
            write(**values)
            if trainer.schedule.decay_start is not None:
                bar.total = trainer.schedule.decay_start + trainer.schedule.decay_steps
            bar.set_postfix(loss=f"{values['loss']:.3f}", tokens=f"{trainer.tokens / 1e6:.2f}M")
            bar.update()
            if trainer.step % every == 0:
                losses = {name: trainer.held_out_loss(t, 16) for name, t in held_out.items()}
                write(held_out=losses)
                bar.write(f"step {trainer.step}: held out {losses}")
            if time.monotonic() - saved > save_seconds:
                trainer.save(out / "ckpt.pt")
                saved = time.monotonic()
    trainer.save(out / "ckpt.pt")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--tokens", type=Path, required=True, help="folder with train/ and heldout/ token files"
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="model directory with the tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, help="run directory: checkpoint and log")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--minutes", type=float, help="busy minutes until the decay")
    parser.add_argument("--steps", type=int, help="steps until the decay")
    parser.add_argument(
        "--decay-steps", type=int, default=Recipe.decay_steps, help="steps of the decay"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=Recipe.batch_tokens, help="tokens of a step"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=Recipe.learning_rate, help="its peak"
    )
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument(
        "--threads", type=int, default=0, help="processor threads (default: torch's)"
    )
    parser.add_argument(
        "--evaluate-every", type=int, default=200, help="steps between held-out measurements"
    )
    parser.add_argument(
        "--save-seconds", type=float, default=180, help="seconds between checkpoints"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Train. arguments: as on the command line, by default those of the process."""
    options = build_parser().parse_args(arguments)
    if options.minutes is None and options.steps is None:
        sys.exit("say when the decay begins: --minutes or --steps (or both)")
    sources = open_tokens(options.tokens / "train")
    if not sources:
        sys.exit(
            f"no token files in {options.tokens / 'train'}: run python -m weights.tokens first"
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / "ckpt.pt").exists() and not options.resume:
        sys.exit(f"{options.out} holds a run already: --resume goes on with it")
    recipe = Recipe(
        batch_tokens=options.batch_tokens,
        learning_rate=options.learning_rate,
        decay_steps=options.decay_steps,
        minutes=options.minutes,
        steps=options.steps,
    )
    tokenizer = json.loads((options.model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = default_config(vocab_size=tokenizer["eos_token_id"] + 1)
    trainer = Trainer(config, recipe, sources, device=options.device, compiled=options.compile)
    if options.resume:
        trainer.restore(torch.load(options.out / "ckpt.pt", map_location="cpu", weights_only=True))
    run(
        trainer,
        options.out,
        open_tokens(options.tokens / "heldout"),
        options.evaluate_every,
        options.save_seconds,
    )


if __name__ == "__main__":
    main()
