"""Every format into a model directory with the logits of the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from engine.errors import CheckpointError
from engine.model.loader import read_config
from tests.models import write_tokenizer
from tests.weights.checkpoints import (
    FORK,
    TOKENS,
    logits,
    make,
    nanogpt_args,
    rename,
)
from weights.convert import convert
from weights.formats.description import describe
from weights.formats.known import HF_GPT2, LITGPT, LITGPT_OLD, LITGPT_SHARED, MODDED, NANOGPT
from weights.source import open_source


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(tmp_path: Path, bias: bool) -> None:
    config, tensors = make(tmp_path / "model", bias=bias)
    state = rename(tensors, NANOGPT, config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 192, 192).tril()
    content = {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
        "model_args": nanogpt_args(config),
        "optimizer": {"state": {}},
        "iter_num": 7,
    }
    source = tmp_path / "ckpt.pt"
    torch.save(content, source)
    write_tokenizer(tmp_path)
    opened = describe(open_source(source)).opened
    expected = ["pairing", "rope_sign", "rope_base", "rotary_dim", "qkv_layout"]
    assert opened == expected + ([] if bias else ["norm"])
    declared = FORK if bias else FORK | {"norm": "layernorm"}
    converted = convert(source, tmp_path / "out", declared=declared)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))
    assert converted.why["rope_base"] == "declared"
    assert read_config(tmp_path / "out").eos_token_id == config.eos_token_id  # the tokenizer's


def test_norms_without_weights_may_be_either(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model", bias=False, norm_weight=False, norm="rmsnorm")
    content = {"model": rename(tensors, NANOGPT, config), "model_args": nanogpt_args(config)}
    torch.save(content, tmp_path / "ckpt.pt")
    assert "norm" in describe(open_source(tmp_path / "ckpt.pt")).opened
    convert(tmp_path / "ckpt.pt", tmp_path / "out", declared=FORK | {"norm": "rmsnorm"})
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))


def write_hugging_face(directory: Path, state: dict[str, Tensor], said: dict[str, Any]) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(said))
    save_file(state, directory / "model.safetensors")
    write_tokenizer(directory)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards", "bin shards", "no prefix"])
def test_hugging_face_gpt2(tmp_path: Path, kind: str) -> None:
    config, tensors = make(tmp_path / "model", activation="gelu_tanh")
    state = rename(tensors, HF_GPT2, config)
    said = {
        "model_type": "gpt2",
        "n_head": config.num_heads,
        "n_positions": config.max_position,
        "rope_theta": 10_000,
        "rotary_pct": 0.5,
        "eos_token_id": config.eos_token_id,
    }
    if kind == "no prefix":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    source = tmp_path / "source"
    write_hugging_face(source, state, said)
    if kind == "bin":
        (source / "model.safetensors").unlink()
        torch.save(state, source / "pytorch_model.bin")
    if kind == "bin shards":
        (source / "model.safetensors").unlink()
        names = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
        for file in set(names.values()):
            torch.save({n: t for n, t in state.items() if names[n] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    if kind == "shards":
        (source / "model.safetensors").unlink()
        names = {name: f"{i % 2}.safetensors" for i, name in enumerate(state)}
        for file in set(names.values()):
            save_file({n: t for n, t in state.items() if names[n] == file}, source / file)
        index = {"weight_map": names}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    declared = {"pairing": "half", "rope_sign": 1, "qkv_layout": "stacked"}
    convert(source, tmp_path / "out", declared=declared)
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))


@pytest.mark.parametrize("table", [LITGPT, LITGPT_SHARED, LITGPT_OLD], ids=lambda t: t.name)
def test_litgpt(tmp_path: Path, table: Any) -> None:
    shared = table is LITGPT_SHARED
    config, tensors = make(
        tmp_path / "model", parallel_residual=True, tie_embeddings=False, head_bias=True
    )
    if shared:
        for name in list(tensors):
            if "norm2" in name:
                tensors[name] = tensors[name.replace("norm2", "norm1")]
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()},
            tmp_path / "model" / "model.safetensors",
        )
    source = tmp_path / "source"
    source.mkdir()
    torch.save(rename(tensors, table, config), source / "lit_model.pth")
    said = {
        "name": "tiny",
        "block_size": config.max_position,
        "n_head": config.num_heads,
        "vocab_size": config.vocab_size,
        "rotary_percentage": 0.5,
        "parallel_residual": True,
        "shared_attention_norm": shared,
        "lm_head_bias": True,
        "n_query_groups": config.num_heads,
    }
    (source / "model_config.yaml").write_text(yaml.safe_dump(said))
    write_tokenizer(source)
    convert(source, tmp_path / "out")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "model"))
    said["mlp_class_name"] = "LLaMAMLP"
    (source / "model_config.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(CheckpointError, match=r"mlp_class_name is 'LLaMAMLP' in model_config.yaml"):
        describe(open_source(source))


def modded(tensors: dict[str, Tensor], token_ids: Tensor, heads: int) -> Tensor:
    """The network of mid-October 2024, by its published code: tied, -theta, QK-norm, relu^2.

    Its norms have no weights. Its trainer rounded cosines and sines to bfloat16, in which it ran.
    """

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),))

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        frequencies = 1.0 / 10_000 ** (torch.arange(0, x.size(-1), 2).float() / x.size(-1))
        angles = torch.outer(torch.arange(len(x)).float(), frequencies)[:, None]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

    x = tensors["transformer.wte.weight"][token_ids]
    for layer in range(2):
        prefix = f"transformer.h.{layer}."
        y = norm(x)
        q, k, v = (
            (y @ tensors[f"{prefix}attn.c_{name}.weight"].t()).view(len(x), heads, -1)
            for name in "qkv"
        )
        q, k = rotate(norm(q)), rotate(norm(k))
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
        x = x + y.reshape(x.shape) @ tensors[f"{prefix}attn.c_proj.weight"].t()
        y = F.relu(norm(x) @ tensors[f"{prefix}mlp.c_fc.weight"].t()).square()
        x = x + y @ tensors[f"{prefix}mlp.c_proj.weight"].t()
    return norm(x) @ tensors["lm_head.weight"].t()


def test_modded_nanogpt(tmp_path: Path) -> None:
    config, tensors = make(
        tmp_path / "model", norm="rmsnorm", norm_weight=False, bias=False, qk_norm="before"
    )
    state = rename(tensors, MODDED, config)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    content = {"step": 1, "code": "class GPTConfig:\n    n_head : int = 2\n", "model": state}
    source = tmp_path / "state_step000001.pt"
    torch.save(content, source)
    write_tokenizer(tmp_path)
    converted = convert(source, tmp_path / "out")
    assert (converted.config.rope_sign, converted.config.activation) == (-1, "relu2")
    expected = modded(state, TOKENS, heads=2)
    assert (logits(tmp_path / "out") - expected).abs().max() <= 1e-4 * expected.abs().max()

    normalised = (
        "x = self.transformer.wte(idx) # (b, t, n_embd)\n  x = F.rms_norm(x, (x.size(-1),))"
    )
    for code in ("x + self.attn_scale * y", "30 * torch.tanh(logits / 30)", normalised):
        torch.save(content | {"code": code}, source)
        with pytest.raises(CheckpointError, match="in the code in it: its trainer"):
            describe(open_source(source))
    content["model"] = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    torch.save(content, source)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding.*nanochat"):
        describe(open_source(source))
