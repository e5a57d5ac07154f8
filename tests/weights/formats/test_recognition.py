"""What has no place is refused by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.errors import CheckpointError
from tests.weights.checkpoints import (
    make,
    nanogpt_args,
    rename,
)
from weights.formats.description import describe
from weights.formats.known import NANOGPT
from weights.source import open_source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("transformer.wpe.weight", "learned absolute positions"),
        ("value_embeds.0.weight", "value embeddings"),
        ("transformer.h.0.attn.ve_gate.weight", "value embeddings"),
        ("attn_bank", "weights in banks"),
        ("resid_lambdas", "learned mixing"),
        ("transformer.h.0.mlp.gate_proj.weight", "gated or expert"),
        ("transformer.h.0.attn.surprise.weight", "unknown tensor transformer.h.0.attn.surprise"),
        ("transformer.h.1.ln_3.weight", "unknown tensor transformer.h.1.ln_3.weight"),
    ],
)
def test_refused_by_name(tmp_path: Path, name: str, message: str) -> None:
    config, tensors = make(tmp_path / "model")
    state = rename(tensors, NANOGPT, config) | {name: torch.ones(4, 4)}
    torch.save({"model": state, "model_args": nanogpt_args(config)}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        describe(open_source(tmp_path / "ckpt.pt"))
