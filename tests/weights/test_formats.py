"""Every format into a model directory with the logits of the model it was made from."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_embedding_torch import RotaryEmbedding
from safetensors.torch import save_file
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
from weights.formats.known import HF_GPT2, LITGPT, LITGPT_OLD, LITGPT_SHARED, MODDED, NANOGPT
from weights.source import Source, open_source

DECLARED = {"pairing": "half", "rope_sign": 1, "rope_base": 10_000, "rotary_dim": 16}
FORK = DECLARED | {"qkv_layout": "stacked"}


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
    refused({f"transformer.h.{i}.attn.c_attn.bias": None for i in (0,)}, "what makes|has no place")


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
@settings(max_examples=200, deadline=None)
def test_any_settings_are_described_or_refused(small: Source, changes: dict[str, Any]) -> None:
    with suppress(CheckpointError):
        describe(replace(small, settings=small.settings | changes))


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
