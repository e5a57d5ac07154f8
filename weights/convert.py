"""A checkpoint of any known format into a model directory, or into one for Hugging Face.

What the files leave open is settled by weights.inspect, or declared; nothing is guessed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.frontend.tokenizer import Tokenizer
from engine.model.loader import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from weights.formats.assembly import all_tensors
from weights.formats.description import LAYOUT, Description, describe
from weights.formats.table import Layout
from weights.inspect import Verdict, judge
from weights.leave import neox_config, neox_tensors
from weights.source import open_source
from weights.summary import SHOWN, Summary
from weights.tokenizer.convert import convert_tokenizer
from weights.tokenizer.vocabulary import END_OF_TEXT

Target = Literal["ropeway", "gpt-neox"]
SHARD_BYTES = 2 * 2**30
"""What is held in memory at a time, beside the largest tensor."""

Progress = Callable[[Iterable[tuple[str, Tensor]], int], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Converted:
    """What was written. why: where each setting that shapes cannot tell was found.

    verdict: what a text told of what the files leave open, '' where nothing was.
    """

    source: Path
    directory: Path
    format: str
    config: ModelConfig
    why: dict[str, str]
    tokenizer: str
    num_tensors: int
    num_bytes: int
    verdict: str = ""

    def summary(self) -> Summary:
        """In words."""
        config = self.config
        layers, width, heads = config.num_layers, config.hidden_size, config.num_heads
        return Summary(
            source=str(self.source),
            directory=str(self.directory),
            format=self.format,
            shape=f"{layers} layers, {width} wide, {heads} heads",
            tokenizer=self.tokenizer,
            num_tensors=self.num_tensors,
            size=self.num_bytes,
            settings=[
                (name, str(getattr(config, name)), self.why.get(name, "the default"))
                for name in SHOWN
            ],
            verdict=self.verdict,
        )


def convert(
    path: Path,
    directory: Path,
    target: Target = "ropeway",
    declared: Mapping[str, Any] | None = None,
    text: str | None = None,
    console: Console | None = None,
) -> Converted:
    """Write `directory`, which must not exist or be empty; whole or not at all.

    declared: settings that the user vouches for. text: what open candidates are scored on, else
    the sample that ships. console: where progress is shown. Raises CheckpointError and
    TokenizerError.
    """
    directory = directory.resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory}: exists; name a new directory")
    description = describe(open_source(path), declared)
    partial = directory.with_name(directory.name + ".partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made: {error.strerror}") from error
    try:
        said = convert_tokenizer(description.source.directory, partial)
        tokenizer = Tokenizer.from_directory(partial) if said else None
        verdict = settle(description, tokenizer, text, console)
        chosen = verdict.best if verdict else {}
        config = description.config(chosen)
        if tokenizer is not None:
            says = "eos_token_id" in description.source.settings
            config = _with_tokenizer(config, tokenizer, None if says else END_OF_TEXT)
        layout = cast(Layout, (description.known | chosen)[LAYOUT])
        count = len(description.parts)
        tensors: Iterator[tuple[str, Tensor]] = all_tensors(description, layout, config)
        settings = config.to_dict()
        if target == "gpt-neox":
            settings = neox_config(config)
            tensors = neox_tensors(config, tensors)
        if console is not None:
            tensors = iter(track(tensors, "tensors", total=count, console=console))
        written, size = write_shards(partial, tensors)
        _write_json(partial / CONFIG_FILE, settings)
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    why = description.why | dict.fromkeys(chosen, "scored on text")
    return Converted(
        path,
        directory,
        description.format.title,
        config,
        why,
        said or "none",
        written,
        size,
        verdict.words if verdict else "",
    )


def settle(
    description: Description,
    tokenizer: Tokenizer | None,
    text: str | None = None,
    console: Console | None = None,
) -> Verdict | None:
    """What a text tells of what the files leave open; None where that is nothing.

    Raises CheckpointError where it does not tell, with the options that would settle it.
    """
    if not description.opened:
        return None
    path, names = description.source.path, ", ".join(description.opened)
    declare = " ".join(f"--set {name}=..." for name in description.opened)
    if tokenizer is None:
        raise CheckpointError(
            f"{path}: the files leave {names} open, and without a tokenizer no text can tell; "
            f"declare them ({declare}), or put the tokenizer's files beside the weights"
        )
    verdict = judge(description, tokenizer, text, console)
    if not verdict.clear:
        raise CheckpointError(
            f"{path}: the files leave {names} open, and the text does not tell: "
            f"{verdict.sentence}; declare them ({declare}), or give a longer text like the "
            f"training text (--text FILE); `ropeway inspect {path}` shows the candidates"
        )
    return verdict


def _with_tokenizer(config: ModelConfig, tokenizer: Tokenizer, end: str | None) -> ModelConfig:
    """Ids that no token has are never sampled. end: the token that ends a text, if none is said."""
    if len(tokenizer) > config.padded_vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} ids, the model {config.padded_vocab_size}: "
            "it is another model's"
        )
    eos = config.eos_token_id
    if eos is None and end is not None:
        eos = tokenizer.special_tokens.get(end)
    if eos is not None and eos not in tokenizer:
        eos = None
    return replace(config, vocab_size=len(tokenizer), eos_token_id=eos)


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
    """model.safetensors, or shards with an index where it would be large; (tensors, bytes)."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    count = total = size = 0

    def write() -> None:
        path = directory / f"model-{len(shards) + 1:05}.safetensors"
        # Not save_file(): that leaves a file which only its owner can read.
        path.write_bytes(save(held, metadata={"format": "pt"}))
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        # One norm may feed both halves of a layer: safetensors stores no memory twice.
        there = {other.untyped_storage().data_ptr() for other in held.values()}
        held[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in there else tensor
        count, total, size = count + 1, total + tensor.nbytes, size + tensor.nbytes
    write()
    if len(shards) == 1:
        (directory / "model-00001.safetensors").rename(directory / WEIGHTS_FILE)
        return count, total
    names = {
        name: f"model-{number:05}.safetensors"
        for number, shard in enumerate(shards, start=1)
        for name in shard
    }
    _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": names})
    return count, total


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
