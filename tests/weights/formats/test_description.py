"""What a checkpoint says of itself is checked before it is believed."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import CheckpointError
from tests.weights.checkpoints import (
    FORK,
    make,
    nanogpt_args,
    rename,
)
from weights.convert import convert
from weights.formats.description import describe
from weights.formats.known import LITGPT, NANOGPT
from weights.source import Source, open_source


def test_settings_of_another_format(tmp_path: Path) -> None:
    """A default means something only where the format's own file leaves it out."""
    config, tensors = make(tmp_path / "model", parallel_residual=True, tie_embeddings=False)
    source = tmp_path / "source"
    source.mkdir()
    torch.save(rename(tensors, LITGPT, config), source / "lit_model.pth")
    (source / "config.json").write_text('{"model_type": "gpt_neox", "num_attention_heads": 2}')
    with pytest.raises(CheckpointError, match=r"keeps its settings in model_config\.yaml, which"):
        describe(open_source(source))
    neox = tmp_path / "neox"
    convert(tmp_path / "model", neox, "gpt-neox")
    said = json.loads((neox / "config.json").read_text())
    (neox / "config.json").write_text(json.dumps(said | {"model_type": "gpt_neox_japanese"}))
    with pytest.raises(CheckpointError, match=r"model_type is 'gpt_neox_japanese' in config\.json"):
        describe(open_source(neox))
    (neox / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"keeps its settings in config\.json, which"):
        describe(open_source(neox))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"n_head": "2"}, "num_heads must be a positive integer, got '2'"),
        ({"n_head": 3}, "a width of 64 does not divide into 3 heads"),
        ({"n_head": None}, "nothing says num_heads"),
        ({"block_size": None}, "nothing says max_position"),
        ({"n_kv_head": 1}, "grouped queries"),
        ({"activation": "swish"}, "activation is 'swish'; supported: gelu"),
        ({"rope_base": "big"}, "rope_base must be a number"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is .* rotated wrongly"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, args: dict[str, Any], message: str) -> None:
    config, tensors = make(tmp_path / "model")
    content = {
        "model": rename(tensors, NANOGPT, config),
        "model_args": nanogpt_args(config, **args),
    }
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=message):
        describe(open_source(tmp_path / "ckpt.pt"))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model")
    good = rename(tensors, NANOGPT, config)
    path = tmp_path / "ckpt.pt"

    def refused(change: dict[str, Tensor | None], message: str) -> None:
        state = {k: v for k, v in (good | change).items() if v is not None}
        torch.save({"model": state, "model_args": nanogpt_args(config)}, path)
        with pytest.raises(CheckpointError, match=message):
            convert(path, tmp_path / "out", declared=FORK)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    key = "transformer.h.1.mlp.c_proj.weight"
    refused({key: torch.ones(64, 7)}, rf"tensor {key} has shape \[64, 7\], \[64, 160\] is needed")
    refused({key: good[key].int()}, f"tensor {key} has type torch.int32; one of F64")
    refused({key: None}, "what makes blocks.1.mlp.down.weight is missing")
    refused({key: good[key] * torch.nan}, f"tensor {key} holds NaN")
    bias = "transformer.h.1.attn.c_attn.bias"
    refused({bias: None}, "what makes blocks.1.qkv.bias is missing")
    refused({bias.replace("1", "0"): None}, "has no place")


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=3), st.just([]),
    st.just({"rope_theta": "x"}),
)  # fmt: skip
KEYS = ("n_head", "block_size", "vocab_size", "bias", "activation", "norm_eps", "eos_token_id")
KEYS += ("rope_base", "rope_theta", "rotary_dim", "rotary_pct", "pairing", "rope_sign", "norm")
KEYS += ("rope_parameters", "n_kv_head", "rope_scaling")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("small")
    config, tensors = make(folder / "model")
    state = rename(tensors, NANOGPT, config)
    torch.save({"model": state, "model_args": nanogpt_args(config)}, folder / "ckpt.pt")
    return open_source(folder / "ckpt.pt")


@given(changes=st.dictionaries(st.sampled_from(KEYS), scalars))
@settings(max_examples=200)
def test_any_settings_are_described_or_refused(small: Source, changes: dict[str, Any]) -> None:
    with suppress(CheckpointError):
        describe(replace(small, settings=small.settings | changes))


def test_an_end_token_that_is_no_token(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model")
    path = tmp_path / "ckpt.pt"
    args = nanogpt_args(config, eos_token_id=50_256)
    torch.save({"model": rename(tensors, NANOGPT, config), "model_args": args}, path)
    description = describe(open_source(path))
    assert "eos_token_id" not in description.known
    assert description.why["eos_token_id"].endswith("eos_token_id is 50256, which no token has")
    with pytest.raises(CheckpointError, match="eos_token_id must be an id below 288, got 288"):
        describe(open_source(path), {"eos_token_id": 288})
