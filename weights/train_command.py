"""`ropeway train`: text in, a model directory out."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from engine.errors import ConfigError, RopewayError
from engine.frontend.tokenizer import Tokenizer
from weights.corpus.tokens import open_tokens
from weights.tokenizer.vocabulary import END_OF_TEXT
from weights.training.curve import draw, read_log
from weights.training.display import Display
from weights.training.evaluate import bits_per_byte
from weights.training.export import export_weights
from weights.training.prepare import HELD_OUT_SIZES, prepare
from weights.training.recipe import TrainingConfig
from weights.training.stop import Stop
from weights.training.train import CHECKPOINT, LOG, Trainer, load_checkpoint, run, trim_log
from weights.training.world import World
from weights.whole import write_whole

app = typer.Typer(add_completion=False, rich_markup_mode=None)
MINUTES = 30.0
SETTINGS = "settings.json"
WEIGHTS = "model.safetensors"

Config = Annotated[
    Path | None, typer.Option(help="TOML file of the run.", show_default="the default model's")
]


@app.command()
def train(
    text: Annotated[
        Path, typer.Argument(metavar="TEXT", help="A folder of .txt files, or one file.")
    ],
    model_dir: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="A new directory, for `ropeway serve`.")
    ],
    *,
    config: Config = None,
    minutes: Annotated[
        float | None, typer.Option(help="Busy minutes in all.", show_default="30, or the file's")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps in all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and batches.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile_: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", min=1, show_default="one per core")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from MODEL_DIR/run, exactly.")
    ] = False,
) -> None:
    """Train a RoPE GPT-2 on text, and leave a model directory that `ropeway serve` opens.

    MODEL_DIR/run holds the run: its settings, tokens, checkpoint and log. The weights in MODEL_DIR
    are written at each checkpoint, so that an unfinished model can be served too. A tokenizer that
    lies in MODEL_DIR is used; else one is trained.

    Ctrl-C stops it after the step, and leaves a checkpoint; --resume goes on from there, with the
    settings of the run. `echo 300 > MODEL_DIR/run/end` ends it in 300 steps.

    Several devices: torchrun --nproc-per-node N -m weights.train_command TEXT MODEL_DIR ...
    """
    changes = {
        "minutes": minutes,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "seed": seed,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    run_dir = model_dir / "run"
    with files_of(model_dir):
        if resume:
            settings = _resumed(run_dir, config, changes)
        else:
            settings = _begun(model_dir, config, changes)
        if threads:
            torch.set_num_threads(threads)
        world = World.join(device)
        console = Console(stderr=True, quiet=not world.leads)
        stopped = _train(
            text, model_dir, settings, world, console, compiled=compile_, resume=resume
        )
    world.leave()
    if stopped:
        raise typer.Exit(128 + stopped)


@contextmanager
def files_of(model_dir: Path) -> Generator[None, None, None]:
    """A file that cannot be read or written, such as on a full disk, is a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{error.filename or model_dir}: {error.strerror or error}") from error


def _begun(model_dir: Path, config: Path | None, changes: dict[str, Any]) -> TrainingConfig:
    """Settings of a new run, where there is room for one."""
    if (model_dir / "run" / CHECKPOINT).exists():
        raise ConfigError(f"{model_dir} holds a run already: --resume goes on with it")
    if (model_dir / WEIGHTS).exists():
        raise ConfigError(
            f"{model_dir} holds a model already ({WEIGHTS}), which training would write over: "
            "choose another model directory"
        )
    if config is None and not changes.keys() & {"minutes", "steps"}:
        changes = changes | {"minutes": MINUTES}
    return TrainingConfig.read(config, changes)


def _resumed(run_dir: Path, config: Path | None, changes: dict[str, Any]) -> TrainingConfig:
    """Settings of a run that goes on: its own, unless told otherwise where that may be."""
    if not (run_dir / CHECKPOINT).exists():
        raise ConfigError(f"{run_dir} holds no checkpoint to resume from")
    try:
        tables = json.loads((run_dir / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{run_dir / SETTINGS}: {error}") from error
    before = TrainingConfig.from_tables(tables, {})
    if config is None:
        settings = TrainingConfig.from_tables(tables, changes)
    else:
        settings = TrainingConfig.read(config, changes)
    settings.check_resumes(before)
    return settings


def _train(
    text: Path,
    model_dir: Path,
    settings: TrainingConfig,
    world: World,
    console: Console,
    *,
    compiled: bool,
    resume: bool,
) -> int:
    """The signal that stopped it, or 0 where it came to its end."""
    run_dir = model_dir / "run"
    if world.leads:
        prepare(text, model_dir, run_dir, settings, console)
    world.agree(None)  # the others wait here until the tokens are there
    tokenizer = Tokenizer.from_directory(model_dir)
    network = settings.model_config(len(tokenizer), tokenizer.special_tokens[END_OF_TEXT])
    trainer = Trainer(
        network,
        settings.recipe,
        open_tokens(run_dir / "tokens" / "train"),
        weights=settings.weights,
        world=world,
        compiled=compiled,
    )
    if resume:
        trainer.restore(load_checkpoint(run_dir / CHECKPOINT))
    if world.leads:
        trim_log(run_dir / LOG, trainer.step)
        tables = json.dumps(settings.to_tables(), indent=2) + "\n"
        write_whole(run_dir / SETTINGS, tables.encode())
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(f"{parameters / 1e6:.2f} million parameters, on {world.device}")
    held_out = open_tokens(run_dir / "tokens" / "heldout")

    def export() -> None:
        export_weights(trainer.checkpoint(), model_dir)

    display = Display(console, every=settings.recipe.evaluate_every, silent=not world.leads)
    with Stop(hurried=world.size == 1) as stop, display:
        done = run(trainer, run_dir, held_out, display, export, lambda: stop.asked is not None)
    if not done:
        console.print(f"stopped after step {trainer.step:,}: --resume goes on from there")
        return stop.asked or signal.SIGINT
    if world.leads:
        draw(read_log(run_dir / LOG), model_dir / "training.png")
        report(trainer, run_dir, console)
        console.print(f"done. Next: ropeway serve {model_dir}")
    return 0


def report(trainer: Trainer, run_dir: Path, console: Console) -> None:
    """Bits per byte of the text that was held out."""
    folder = run_dir / "tokens" / "heldout"
    sizes = json.loads((folder / HELD_OUT_SIZES).read_text(encoding="utf-8"))
    model = trainer.model.to("cpu")
    for name, tokens in open_tokens(folder).items():
        bits = bits_per_byte(model, tokens, sizes[name])
        console.print(f"held out {name}: {bits:.3f} bits per byte of {sizes[name]:,} bytes")


if __name__ == "__main__":
    try:
        app()
    except RopewayError as error:
        sys.exit(f"error: {error}")
