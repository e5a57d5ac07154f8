"""Rotations that are stored as frequencies: followed, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rotary_embedding_torch import RotaryEmbedding
from torch import Tensor
from torch.nn import functional as F

from engine import LLM, SamplingParams
from engine.errors import CheckpointError
from engine.model.loader import load_model, read_config
from engine.scaling import RopeScaling
from tests.models import write_tokenizer
from tests.weights.checkpoints import (
    TOKENS,
    interleave,
    logits,
    make,
    nanogpt_args,
    rename,
)
from weights.convert import convert
from weights.formats.description import describe
from weights.formats.known import NANOGPT
from weights.source import open_source


def test_frequencies_of_rotary_embedding_torch(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model", rope_base=5000.0)
    state = rename(interleave(tensors, config), NANOGPT, config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    rotary = RotaryEmbedding(dim=16, theta=5000.0)
    for layer in range(config.num_layers):
        for name, tensor in rotary.state_dict().items():
            state[f"transformer.h.{layer}.attn.rotary_emb.{name}"] = tensor
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": nanogpt_args(config)}, path)
    description = describe(open_source(path))
    assert description.opened == ["qkv_layout"]
    convert(path, tmp_path / "out", declared={"qkv_layout": "stacked"})
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))

    args = nanogpt_args(config, rope_base=10_000)
    torch.save({"model": state, "model_args": args}, path)
    with pytest.raises(CheckpointError, match=r"say rope_base 5000.0, ckpt.pt: rope_base 10000"):
        describe(open_source(path))
    key = "transformer.h.1.attn.rotary_emb.freqs"
    state[key] = state[key][:-1]
    torch.save({"model": state, "model_args": nanogpt_args(config)}, path)
    with pytest.raises(CheckpointError, match=r"differ, and are not one list of equal length"):
        describe(open_source(path))


@pytest.mark.parametrize("per_layer", [False, True])
def test_learned_frequencies_of_rotary_embedding_torch(tmp_path: Path, per_layer: bool) -> None:
    """The logits are those of attention that is rotated by the library itself."""
    config, tensors = make(tmp_path / "model")
    state = rename(interleave(tensors, config), NANOGPT, config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    generator = torch.Generator().manual_seed(2)
    rotaries = []
    for layer in range(config.num_layers):
        if per_layer or not rotaries:
            freqs = torch.randn(8, generator=generator)
            rotaries.append(RotaryEmbedding(dim=16, custom_freqs=freqs, learned_freq=True))
        state[f"transformer.h.{layer}.attn.rotary_emb.freqs"] = rotaries[-1].freqs.detach()
    torch.save({"model": state, "model_args": nanogpt_args(config)}, tmp_path / "ckpt.pt")
    write_tokenizer(tmp_path)
    convert(tmp_path / "ckpt.pt", tmp_path / "out", declared={"qkv_layout": "stacked"})
    convert(tmp_path / "out", tmp_path / "again")
    expected_kind = "per_layer" if per_layer else "shared"
    assert read_config(tmp_path / "again").learned_frequencies == expected_kind

    def attention(layer: int, qkv: Tensor) -> Tensor:
        heads = qkv.view(len(qkv), 3, config.num_heads, -1).permute(1, 2, 0, 3).clone()
        rotated = heads[:2, ..., :16].unflatten(-1, (2, 8)).transpose(-1, -2).flatten(-2)
        heads[:2, ..., :16] = rotaries[layer if per_layer else 0].rotate_queries_or_keys(rotated)
        query, key, value = heads[:, None]
        return (
            F.scaled_dot_product_attention(query, key, value, is_causal=True)[0]
            .transpose(0, 1)
            .reshape(len(qkv), -1)
        )

    model = load_model(tmp_path / "model", torch.float32)
    with torch.inference_mode():
        expected = model.logits(model(TOKENS, attention))[:, : config.vocab_size].log_softmax(-1)
    llm = LLM(tmp_path / "again", device="cpu", dtype="float32", block_size=16)
    for at in range(1, len(TOKENS)):
        (completion,) = llm.generate(
            [TOKENS[:at].tolist()], SamplingParams(temperature=0, max_tokens=1, logprobs=0)
        )
        assert completion.logprobs is not None
        assert completion.token_ids[0] == int(expected[at - 1].argmax())
        assert completion.logprobs[0].logprob == pytest.approx(
            float(expected[at - 1].max()), abs=1e-4
        )


def test_xpos_is_not_dropped_in_silence(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model")
    state = rename(interleave(tensors, config), NANOGPT, config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    rotary = RotaryEmbedding(dim=16, use_xpos=True)
    state["transformer.rotary_emb.freqs"] = rotary.freqs
    state["transformer.rotary_emb.scale"] = rotary.scale  # its buffer was persistent once
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": nanogpt_args(config)}, path)
    declared: dict[str, Any] = {"qkv_layout": "stacked"}
    with pytest.raises(CheckpointError, match=r"rotary_emb.scale says xPos, .* declare rope"):
        convert(path, tmp_path / "out", declared=declared)
    declared["rope"] = {"type": "xpos", "scale_base": 64}
    convert(path, tmp_path / "out", declared=declared)
    assert read_config(tmp_path / "out").rope == RopeScaling(type="xpos", scale_base=64)
