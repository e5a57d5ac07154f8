"""Model directories: what loads, and how what does not is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from tests.models import tiny_config, write_model

TOKENS = torch.tensor([5, 6, 7, 200, 201, 3, 5, 5, 9])


def logits(directory: Path) -> Tensor:
    model = load_model(directory, torch.float32)
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    return model.logits(model(TOKENS, attention))


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "-"}))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_loads_what_was_saved(tmp_path: Path, tie: bool, bias: bool) -> None:
    config = tiny_config(tie_embeddings=tie, bias=bias)
    model = write_model(tmp_path, config)
    attention = NaiveAttention(RotaryTable.for_model(config), config.num_heads)
    assert torch.equal(logits(tmp_path), model.logits(model(TOKENS, attention)))


@pytest.mark.parametrize("qk_norm_weight", [False, True])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("rope_sign", [1, -1])
def test_rotations_as_stored(
    tmp_path: Path, pairing: str, rope_sign: int, qk_norm_weight: bool
) -> None:
    """A model as its trainer would run it: its own pairs, its own sign, nothing permuted."""
    changes = {"qk_norm": "before", "qk_norm_weight": True} if qk_norm_weight else {}
    config = tiny_config(pairing=pairing, rope_sign=rope_sign, **changes)
    model = write_model(tmp_path, config)

    def attention(layer: int, qkv: Tensor) -> Tensor:
        time, dim = len(qkv), config.head_dim
        query, key, value = qkv.view(time, 3, config.num_heads, dim).permute(1, 2, 0, 3)
        frequencies = 10_000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
        angles = rope_sign * torch.outer(torch.arange(time, dtype=torch.float64), frequencies)
        turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

        def rotated(x: Tensor) -> Tensor:
            pair = slice(0, 16, 2), slice(1, 16, 2)
            if pairing == "half":
                pair = slice(0, 8), slice(8, 16)
            out = x.clone()
            turned = (
                torch.complex(x[..., pair[0]].contiguous(), x[..., pair[1]].contiguous()) * turn
            )
            out[..., pair[0]], out[..., pair[1]] = turned.real, turned.imag
            return out

        scores = rotated(query) @ rotated(key).transpose(1, 2) / dim**0.5
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return (weights @ value).transpose(0, 1).reshape(time, -1)

    expected = model.logits(model(TOKENS, attention))
    torch.testing.assert_close(logits(tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_interleaved_pairs_are_the_same_model(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config())
    expected = logits(tmp_path)

    def interleave(tensors: dict[str, Tensor]) -> None:
        config = tiny_config()
        half = config.rotary_dim // 2
        order = list(range(config.head_dim))
        order[: config.rotary_dim : 2], order[1 : config.rotary_dim : 2] = (
            list(range(half)),
            list(range(half, 2 * half)),
        )
        for name, tensor in tensors.items():
            if ".qkv." in name:
                heads = tensor.view(3, config.num_heads, config.head_dim, -1).clone()
                heads[:2] = heads[:2, :, order]
                tensors[name] = heads.reshape(tensor.shape).contiguous()

    change_tensors(tmp_path, interleave)
    assert not torch.allclose(logits(tmp_path), expected, atol=1e-3)
    change_config(tmp_path, pairing="interleaved")
    assert torch.equal(logits(tmp_path), expected)


def test_shards(tmp_path: Path) -> None:
    write_model(tmp_path, tiny_config())
    expected = logits(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / file)
    index = {name: file for file, members in shards.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(logits(tmp_path), expected)

    index["norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "1 tensors are missing, first norm.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "unknown tensor extra"),
        (
            lambda t: t.update({"norm.weight": torch.ones(63)}),
            r"norm.weight has shape \[63\]; config.json says \[64\]",
        ),
        (
            lambda t: t.update({"norm.weight": torch.ones(64, dtype=torch.int32)}),
            "norm.weight has type I32",
        ),
        (
            lambda t: t["blocks.1.mlp.up.weight"].view(-1)[3].fill_(torch.nan),
            "blocks.1.mlp.up.weight holds NaN",
        ),
    ],
)
def test_bad_tensors(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    write_model(tmp_path, tiny_config())
    change_tensors(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dim": "-"}, "missing model settings: rotary_dim"),
        ({"rotary": 3}, "unknown model settings: rotary; known: "),
        ({"rotary_dim": 15}, r"rotary_dim must be even and at most head_dim \(32\), got 15"),
        ({"rotary_dim": 34}, "got 34"),
        ({"num_heads": 3}, r"hidden_size must be a multiple of num_heads \(3\), got 64"),
        ({"pairing": "both"}, "pairing must be one of half, interleaved; got 'both'"),
        ({"activation": "swish"}, "activation must be one of gelu, gelu_tanh, relu, relu2"),
        ({"norm": "batch"}, "norm must be one of layernorm, rmsnorm"),
        ({"norm": "rmsnorm", "norm_bias": True}, "norm_bias must not be true"),
        ({"rope_sign": 0}, "rope_sign must be 1 or -1, got 0"),
        ({"mlp_bias": 1}, "mlp_bias must be true, false or null, got 1"),
        (
            {"qk_norm": "after", "qk_norm_weight": True},
            "qk_norm_weight must be false with qk_norm 'after': .* distance alone",
        ),
        ({"vocab_size": 1000}, "padded_vocab_size must be at least 1000, got 288"),
        ({"rope_base": 0.5}, "rope_base must be greater than 1"),
        ({"bias": 1}, "bias must be true or false, got 1"),
        ({"num_layers": "2"}, "num_layers must be an integer, got '2'"),
        ({"eos_token_id": 300}, r"eos_token_id must be below vocab_size \(268\), got 300"),
        ({"rope_base": "big"}, "rope_base must be a number, got 'big'"),
    ],
)
def test_bad_config(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_model(tmp_path, tiny_config())
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path, torch.float32)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        load_model(tmp_path / "nowhere", torch.float32)
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(tmp_path, torch.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        load_model(tmp_path, torch.float32)


def test_config_round_trip() -> None:
    config = tiny_config(pairing="interleaved", rope_base=500.0)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_loading_imports_no_compiler(tiny_model_dir: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from engine.model.loader import load_model; "
        f"load_model(Path({str(tiny_model_dir)!r}), torch.float32); "
        "print([name for name in ('torch._dynamo', 'sympy', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
