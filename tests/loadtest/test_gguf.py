"""GGUF files: read back by llama.cpp's own reader, compared with Hugging Face and tiktoken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Reference
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

from engine.errors import CheckpointError
from engine.frontend.tokenizer import Tokenizer
from loadtest.bench.options import DEFAULT_MODEL
from loadtest.gguf import Kind, write_gguf
from tests.models import EOS, tiny_config, write_model
from weights.convert import convert


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as GPT-NeoX."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "ours").mkdir()
    write_model(folder / "ours", tiny_config(rope_base=5000.0, norm_eps=2e-5))
    convert(folder / "ours", folder / "neox", "gpt-neox")
    return folder / "neox"


def read(neox: Path, tmp_path: Path, kind: Kind) -> gguf.GGUFReader:
    path = tmp_path / f"{kind}.gguf"
    write_gguf(neox, path, kind)
    return gguf.GGUFReader(path)


def tensors(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    return {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())
        for each in reader.tensors
    }


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def test_settings(neox: Path, tmp_path: Path) -> None:
    reader = read(neox, tmp_path, "f32")
    assert value(reader, "general.architecture") == "gptneox"
    assert value(reader, "gptneox.context_length") == 192
    assert value(reader, "gptneox.rope.dimension_count") == 16
    assert value(reader, "gptneox.rope.freq_base") == 5000.0
    assert value(reader, "gptneox.attention.layer_norm_epsilon") == pytest.approx(2e-5)
    assert value(reader, "gptneox.use_parallel_residual") is False
    assert value(reader, "tokenizer.ggml.eos_token_id") == EOS
    tokens = value(reader, "tokenizer.ggml.tokens")
    assert len(tokens) == 288
    assert (tokens[258], tokens[EOS]) == ("Ġthe", "<|endoftext|>")


def test_layers_are_hugging_faces(neox: Path, tmp_path: Path) -> None:
    """Query, key and value as Hugging Face computes them are the three thirds of ours."""
    found = tensors(read(neox, tmp_path, "f32"))
    model = AutoModelForCausalLM.from_pretrained(neox)
    rows = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for at, layer in enumerate(model.gpt_neox.layers):
        attention = layer.attention
        with torch.no_grad():
            # GPTNeoXAttention.forward: [heads, 3 x head_dim], then in three
            parts = attention.query_key_value(rows).view(3, 2, 3 * 32).chunk(3, dim=-1)
        flat = rows @ found[f"blk.{at}.attn_qkv.weight"].T + found[f"blk.{at}.attn_qkv.bias"]
        for theirs, ours in zip(parts, flat.chunk(3, dim=-1), strict=True):
            torch.testing.assert_close(ours, theirs.reshape(3, 64))
        for name, module in {
            "attn_output": attention.dense,
            "attn_norm": layer.input_layernorm,
            "ffn_norm": layer.post_attention_layernorm,
            "ffn_up": layer.mlp.dense_h_to_4h,
            "ffn_down": layer.mlp.dense_4h_to_h,
        }.items():
            assert torch.equal(found[f"blk.{at}.{name}.weight"], module.weight)
            assert torch.equal(found[f"blk.{at}.{name}.bias"], module.bias)
    assert torch.equal(found["token_embd.weight"], model.gpt_neox.embed_in.weight)
    assert torch.equal(found["output.weight"], model.get_output_embeddings().weight)
    assert torch.equal(found["output_norm.bias"], model.gpt_neox.final_layer_norm.bias)
    assert len(found) == 2 * 12 + 4


@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("q8_0", 2**-6)])
def test_smaller_kinds(neox: Path, tmp_path: Path, kind: Kind, error: float) -> None:
    """Matrices lose what their kind loses; norms and biases nothing."""
    exact, found = tensors(read(neox, tmp_path, "f32")), tensors(read(neox, tmp_path, kind))
    assert exact.keys() == found.keys()
    for name, tensor in exact.items():
        if tensor.ndim == 1:
            assert torch.equal(found[name], tensor)
        else:
            assert not torch.equal(found[name], tensor)
            assert (found[name] - tensor).abs().max() <= error * tensor.abs().max()


def test_merges_are_the_tokenizer(tmp_path: Path) -> None:
    """`tokenizers`, given the tokens and merges of the file, agrees with tiktoken on words."""
    convert(DEFAULT_MODEL, tmp_path / "neox", "gpt-neox")
    reader = read(tmp_path / "neox", tmp_path, "q8_0")
    tokens = value(reader, "tokenizer.ggml.tokens")
    merges = [tuple(each.split(" ")) for each in value(reader, "tokenizer.ggml.merges")]
    reference = Reference(BPE({token: at for at, token in enumerate(tokens)}, merges))
    reference.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    ours = Tokenizer.from_directory(DEFAULT_MODEL)
    rng = np.random.default_rng(0)
    text = (DEFAULT_MODEL.parent / "sample.txt").read_text("utf-8").split()
    words = [f" {word}" for word in rng.choice([w for w in text if w.isalpha()], 500)]
    assert [reference.encode(word).ids for word in words] == [ours.encode(word) for word in words]


def test_refuses(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'; expected 'gpt_neox'"):
        write_gguf(tmp_path, tmp_path / "out.gguf", "f32")
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "hidden_act": "relu2"}')
    with pytest.raises(CheckpointError, match="GELU only, not relu2"):
        write_gguf(tmp_path, tmp_path / "out.gguf", "f32")
