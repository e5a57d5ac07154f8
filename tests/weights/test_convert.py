"""A model directory is written whole or not at all, and nothing of it is guessed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from engine.model.loader import load_model
from tests.weights.checkpoints import (
    FORK,
    logits,
    make,
    nanogpt_args,
    rename,
)
from weights.convert import convert
from weights.formats.known import NANOGPT


def test_a_directory_that_is_in_use(tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match="model: exists; name a new directory"):
        convert(tmp_path / "model", tmp_path / "model")


def test_without_tokenizer_nothing_is_guessed(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model")
    (tmp_path / "source").mkdir()
    content = {"model": rename(tensors, NANOGPT, config), "model_args": nanogpt_args(config)}
    torch.save(content, tmp_path / "source" / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"leave pairing, .* open, and without a tokenizer"):
        convert(tmp_path / "source", tmp_path / "out")
    convert(tmp_path / "source", tmp_path / "out", declared=FORK)
    load_model(tmp_path / "out", torch.float32)


def test_shards_are_written_where_a_model_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "model")
    monkeypatch.setattr("weights.convert.SHARD_BYTES", 100_000)
    convert(tmp_path / "model", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))
    convert(tmp_path / "out", tmp_path / "again")
    assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "model"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second shard; what was written goes, the user's files stay."""
    make(tmp_path / "model")
    monkeypatch.setattr("weights.convert.SHARD_BYTES", 100_000)
    write_bytes, shards = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        if path.suffix == ".safetensors":
            shards.append(path)
            if len(shards) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written: .*No space left on device"):
        convert(tmp_path / "model", tmp_path / "out")
    assert len(shards) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_written(tmp_path: Path) -> None:
    make(tmp_path / "model")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match=r"out\.partial: cannot be made: File exists"):
        convert(tmp_path / "model", tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"
