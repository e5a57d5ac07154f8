"""`ropeway train`: text in, a model directory out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from engine.errors import ConfigError, RopewayError
from engine.frontend.tokenizer import Tokenizer
from weights.bpe import END_OF_TEXT
from weights.curve import draw, read_log
from weights.display import Display
from weights.evaluate import bits_per_byte
from weights.export import export_weights
from weights.prepare import HELD_OUT_SIZES, prepare
from weights.recipe import TrainingConfig
from weights.tokens import open_tokens
from weights.train import CHECKPOINT, LOG, Trainer, run
from weights.world import World

app = typer.Typer(add_completion=False, rich_markup_mode=None)
MINUTES = 30.0

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

    MODEL_DIR/run holds the run: its tokens, checkpoint and log. The weights in MODEL_DIR are
    written at each checkpoint, so that an unfinished model can be served too. A tokenizer that
    lies in MODEL_DIR is used; else one is trained.

    Ctrl-C stops it; --resume goes on. `echo 300 > MODEL_DIR/run/end` ends it in 300 steps.

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
    if config is None and not changes.keys() & {"minutes", "steps"}:
        changes["minutes"] = MINUTES
    settings = TrainingConfig.read(config, changes)
    run_dir = model_dir / "run"
    if (run_dir / CHECKPOINT).exists() and not resume:
        raise ConfigError(f"{model_dir} holds a run already: --resume goes on with it")
    if resume and not (run_dir / CHECKPOINT).exists():
        raise ConfigError(f"{run_dir} holds no checkpoint to resume from")
    if threads:
        torch.set_num_threads(threads)
    world = World.join(device)
    console = Console(stderr=True, quiet=not world.leads)
    if world.leads:
        run_dir.mkdir(parents=True, exist_ok=True)
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
        compiled=compile_,
    )
    if resume:
        trainer.restore(torch.load(run_dir / CHECKPOINT, map_location="cpu", weights_only=True))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    console.print(f"{parameters / 1e6:.2f} million parameters, on {world.device}")
    held_out = open_tokens(run_dir / "tokens" / "heldout")

    def export() -> None:
        export_weights(trainer.checkpoint(), model_dir)

    display = Display(console, every=settings.recipe.evaluate_every, silent=not world.leads)
    with display:
        run(trainer, run_dir, held_out, display, export)
    if world.leads:
        draw(read_log(run_dir / LOG), model_dir / "training.png")
        report(trainer, run_dir, console)
        console.print(f"done. Next: ropeway serve {model_dir}")
    world.leave()


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
