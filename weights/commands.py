"""`ropeway convert` and `ropeway inspect`, as the command line calls them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.frontend.tokenizer import Tokenizer
from weights import convert as conversion
from weights.convert import Target
from weights.formats.description import LAYOUT, describe
from weights.inspect import judge, show_description, show_verdict
from weights.source import open_source
from weights.summary import show
from weights.tokenizer.convert import convert_tokenizer


def parse_declarations(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, values as in config.json; a word needs no quotes. Raises CheckpointError."""
    known = {each.name for each in fields(ModelConfig)} | {LAYOUT}
    declared: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known:
            raise CheckpointError(
                f"--set {pair}: expected NAME=VALUE with one of {', '.join(sorted(known))}"
            )
        try:
            declared[name] = json.loads(value)
        except ValueError:
            declared[name] = value
        if declared[name] is None:
            raise CheckpointError(f"--set {pair}: null is no value")
    return declared


def read_text(path: Path | None) -> str | None:
    """What --text names. Raises CheckpointError."""
    if path is None:
        return None
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise CheckpointError(f"--text {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"--text {path}: is no text in UTF-8: {error}") from error
    if not text.strip():
        raise CheckpointError(f"--text {path}: is empty")
    return text


def convert(
    source: Path, destination: Path, to: Target, text: Path | None, declared: Sequence[str]
) -> None:
    """Write the model directory and show what was done. Raises RopewayError."""
    console = Console(stderr=True)
    values = parse_declarations(declared)
    converted = conversion.convert(source, destination, to, values, read_text(text), console)
    show(converted.summary(), Console())


def inspect(source: Path, text: Path | None, declared: Sequence[str]) -> bool:
    """Show what a checkpoint says and what a text tells; whether nothing stays open.

    Where nothing is open, a text that is given is scored all the same.
    """
    console = Console()
    description = describe(open_source(source), parse_declarations(declared))
    show_description(description, console)
    if not description.opened and text is None:
        return True
    with tempfile.TemporaryDirectory() as folder:
        said = convert_tokenizer(description.source.directory, Path(folder))
        if not said:
            console.print(
                "no verdict: without a tokenizer no text can tell. Put the tokenizer's files "
                "beside the weights, or declare what you know (--set)"
            )
            return False
        tokenizer = Tokenizer.from_directory(Path(folder))
    verdict = judge(description, tokenizer, read_text(text), Console(stderr=True))
    show_verdict(verdict, console)
    return verdict.clear
