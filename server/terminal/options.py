"""Options that several commands have."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from importlib import resources
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any, Concatenate, TypeVar

import typer

from engine.config import Device, DType, Quantize
from engine.errors import ConfigError
from engine.scaling import RopeScaling
from server.terminal.outcome import FAILED, fail
from server.terminal.sizes import parse_size

T = TypeVar("T")


def option(*names: str, **settings: Any) -> Any:
    """An option; its environment variable works but would drown its help."""
    return typer.Option(*names, show_envvar=False, **settings)


def size_option(text: str) -> int:
    """A parser for typer."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def rope_option(text: str) -> RopeScaling:
    """A parser for typer: TYPE, TYPE:FACTOR, or what a request's `rope` may be, as JSON."""
    try:
        if text.lstrip().startswith("{"):
            return RopeScaling.from_dict(json.loads(text))
        kind, _, factor = text.partition(":")
        values: dict[str, Any] = {"type": kind}
        return RopeScaling.from_dict(values | {"factor": float(factor)} if factor else values)
    except (ConfigError, ValueError) as error:
        raise typer.BadParameter(f"{error}; it is such as ntk:4, or JSON, got {text!r}") from error


def taking(
    options: Callable[..., T],
) -> Callable[[Callable[Concatenate[T, ...], None]], Callable[..., None]]:
    """A command whose first argument is a dataclass of options: to typer, they are its own."""
    theirs = signature(options, eval_str=True).parameters

    def decorate(command: Callable[Concatenate[T, ...], None]) -> Callable[..., None]:
        _, *own = signature(command, eval_str=True).parameters.values()

        @wraps(command)
        def run(**values: Any) -> None:
            taken = options(**{name: values.pop(name) for name in theirs})
            command(taken, **values)

        run.__signature__ = Signature([*own, *theirs.values()])  # type: ignore[attr-defined]  # what typer reads
        return run

    return decorate


SET_HELP = "What you know: pairing, rope_base, num_heads or another setting; may be repeated."
SetOption = Annotated[list[str] | None, option("--set", metavar="NAME=VALUE", help=SET_HELP)]
TEXT_HELP = "Text like the training text, to score on what the files leave open."
TextOption = Annotated[Path | None, option(metavar="FILE", help=TEXT_HELP)]

ModelOption = Annotated[
    Path | None, option(metavar="DIR", help="Model directory.", show_default="the shipped")
]
RopeOption = Annotated[
    RopeScaling | None,
    option(
        parser=rope_option,
        metavar="ROPE",
        help="Stretch the context: ntk:4, yarn:4 ..., or JSON as in a request.",
        show_default="the model's own",
    ),
]
DeviceOption = Annotated[Device, option(help="Where the model runs.")]
DTypeOption = Annotated[
    DType, option(help="auto: bfloat16 where the hardware multiplies it, else float32.")
]
QuantizeOption = Annotated[
    Quantize, option(help="int8: weights and the rows they multiply, each with a scale (CPU only).")
]
KvMemoryOption = Annotated[
    int | None,
    option(
        parser=size_option,
        metavar="SIZE",
        help="Memory for the cache, such as 512MiB or 2GiB. Default: whole contexts for all that "
        "run at once, at most half of what is free.",
    ),
]
ThreadsOption = Annotated[
    int | None, option(help="CPU threads of the engine.", show_default="one per core")
]

TemperatureOption = Annotated[float, option(help="0 takes the likeliest token.")]
TopKOption = Annotated[int, option(help="Keep the k likeliest; 0: all.")]
TopPOption = Annotated[float, option(help="Keep the likeliest tokens whose mass reaches p.")]
MinPOption = Annotated[
    float, option(help="Keep tokens at least this much as likely as the likeliest.")
]
RepetitionPenaltyOption = Annotated[float, option(help="Makes tokens that were there less likely.")]
PresencePenaltyOption = Annotated[
    float, option(help="Subtracted once from tokens that the output has.")
]
FrequencyPenaltyOption = Annotated[
    float, option(help="Subtracted for each time that the output has a token.")
]
SeedOption = Annotated[int | None, option(help="Same seed, same text.")]
StopOption = Annotated[list[str] | None, option(help="Text that ends the output; may be repeated.")]
IgnoreEosOption = Annotated[bool, option("--ignore-eos", help="Go on after the model's end token.")]


def model_directory(model: Path | None) -> Path:
    """The directory, or that of the shipped model."""
    directory = Path(str(resources.files("weights") / "default")) if model is None else model
    if not directory.is_dir():
        hint = ": `ropeway convert` makes one of a checkpoint" if directory.exists() else ""
        fail(f"{directory} is not a model directory{hint}", FAILED)
    return directory
