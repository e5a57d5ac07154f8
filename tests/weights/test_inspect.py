"""What a text tells of a rotation that nothing declares."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.frontend.tokenizer import Tokenizer
from engine.model.attention.causal import CausalAttention
from engine.model.gpt2 import GPT2
from engine.model.loader import load_model, read_config
from engine.model.rope import RotaryTable
from server.cli import app
from server.terminal.outcome import UNDECIDED
from tests.models import tiny_config, write_model
from tests.weights.checkpoints import interleave, make, nanogpt_args, rename, turn_back
from weights.convert import convert
from weights.formats.description import describe
from weights.formats.known import NANOGPT
from weights.inspect import judge, sample_text
from weights.source import open_source

DEFAULT = Path(str(resources.files("weights") / "default"))
ROPE = ("pairing", "rope_sign", "rope_base", "rotary_dim")

OFFSET = 15

needs_default = pytest.mark.skipif(
    not (DEFAULT / "model.safetensors").is_file(), reason="no default model here"
)


def stripped(directory: Path, tensors: dict[str, Tensor]) -> None:
    """The default model with other tensors, its settings without a word of rotation."""
    directory.mkdir()
    settings = json.loads((DEFAULT / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ROPE}
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "model.safetensors")
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        (directory / name).write_bytes((DEFAULT / name).read_bytes())


@needs_default
@pytest.mark.parametrize("kind", ["as it is", "interleaved", "minus theta"])
def test_the_default_model_without_its_declarations(tmp_path: Path, kind: str) -> None:
    config = read_config(DEFAULT)
    tensors = load_file(DEFAULT / "model.safetensors")
    expected: dict[str, Any] = {name: getattr(config, name) for name in ROPE}
    if kind == "interleaved":
        tensors = interleave(tensors, config)
        expected["pairing"] = "interleaved"
    if kind == "minus theta":
        tensors = turn_back(tensors, config)
        expected["rope_sign"] = -1
    source, out = tmp_path / "source", tmp_path / "out"
    stripped(source, tensors)
    assert describe(open_source(source)).opened == list(ROPE)
    converted = convert(source, out)
    assert {name: getattr(converted.config, name) for name in ROPE} == expected
    assert converted.why["pairing"] == "scored on text"
    ours, theirs = (load_model(each, torch.float32).state_dict() for each in (out, DEFAULT))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_default
def test_the_order_of_qkv(tmp_path: Path) -> None:
    config = read_config(DEFAULT)
    tensors = load_file(DEFAULT / "model.safetensors")
    for name, tensor in tensors.items():
        if ".qkv." in name:
            heads = tensor.view(3, config.num_heads, config.head_dim, *tensor.shape[1:])
            tensors[name] = heads.transpose(0, 1).reshape(tensor.shape)
    state = rename(tensors, NANOGPT, config)
    args = nanogpt_args(config, rope_base=10_000, rotary_dim=32, activation="gelu_tanh")
    torch.save({"model": state, "model_args": args}, tmp_path / "ckpt.pt")
    description = describe(open_source(tmp_path / "ckpt.pt"))
    assert description.opened == ["pairing", "rope_sign", "qkv_layout"]
    verdict = judge(description, Tokenizer.from_directory(DEFAULT), sample_text()[:4000])
    assert verdict.clear
    assert verdict.best == {"pairing": "half", "rope_sign": 1, "qkv_layout": "per_head"}
    assert len(verdict.scored) == 8


@pytest.fixture(scope="module")
def base_1000(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model trained with base 1,000 to repeat what stood OFFSET tokens before."""
    directory = tmp_path_factory.mktemp("base-1000")
    alphabet = [chr(32 + i) for i in range(24)]
    config = ModelConfig(
        vocab_size=24,
        padded_vocab_size=24,
        num_layers=1,
        num_heads=2,
        hidden_size=64,
        intermediate_size=64,
        max_position=64,
        rotary_dim=32,
        rope_base=1000.0,
    )
    torch.manual_seed(0)
    model = GPT2(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    attention = CausalAttention(RotaryTable.for_model(config), config.num_heads)
    for step in range(150):
        ids = texts(16, 65, seed=step + 1)
        logits = model.logits(model(ids[:, :-1], attention))
        loss = F.cross_entropy(logits[:, OFFSET:].flatten(0, 1), ids[:, OFFSET + 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()
    tensors = {k: v.detach() for k, v in model.state_dict().items() if k != "head.weight"}
    settings = {k: v for k, v in config.to_dict().items() if k not in ROPE}
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "model.safetensors")
    (directory / "tokenizer_config.json").write_text(json.dumps({"characters": alphabet}))
    return directory


def texts(rows: int, length: int, seed: int) -> Tensor:
    """Random, but four of five tokens repeat what stood OFFSET before."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 24, (rows, length), generator=generator)
    noise = torch.rand(rows, length, generator=generator) < 0.2
    for at in range(OFFSET, length):
        ids[:, at] = torch.where(noise[:, at], ids[:, at], ids[:, at - OFFSET])
    return ids


def test_a_tiny_model_of_base_1000(base_1000: Path) -> None:
    text = "".join(chr(32 + i) for i in texts(1, 3000, seed=0)[0].tolist())
    description = describe(open_source(base_1000))
    verdict = judge(description, Tokenizer.from_directory(base_1000), text)
    assert verdict.clear, verdict.sentence
    assert verdict.best == {
        "pairing": "half",
        "rope_sign": 1,
        "rope_base": 1000.0,
        "rotary_dim": 32,
    }


def test_an_alphabet_does_without_what_it_lacks(base_1000: Path) -> None:
    description = describe(open_source(base_1000), dict.fromkeys(ROPE[:1], "half"))
    tokenizer = Tokenizer.from_directory(base_1000)  # punctuation: there is enough in the sample
    verdict = judge(description, tokenizer)
    assert len(verdict.scored[0].losses) > 256
    with pytest.raises(CheckpointError, match=r"the text cannot be tokenised: .* lacks it"):
        judge(description, tokenizer, "letters" * 100)


def test_a_model_that_has_learned_nothing(tmp_path: Path) -> None:
    config, tensors = make(tmp_path / "model")
    (tmp_path / "source").mkdir()
    for name in ("tokenizer.tiktoken", "tokenizer_config.json"):
        content = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "source" / name).write_bytes(content)
    content = {"model": rename(tensors, NANOGPT, config), "model_args": nanogpt_args(config)}
    torch.save(content, tmp_path / "source" / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"the text does not tell: .* better than chance"):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "source")])
    assert run.exit_code == UNDECIDED
    assert "open: pairing, rope_sign, rope_base, rotary_dim, qkv_layout" in run.output
    assert "no verdict: " in run.output


def test_a_text_that_is_too_short(base_1000: Path) -> None:
    description = describe(open_source(base_1000))
    with pytest.raises(CheckpointError, match="has 5 tokens; at least 256 are needed"):
        judge(description, Tokenizer.from_directory(base_1000), "01234")
    assert len(sample_text()) > 8000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (bytes(range(256)), "is no text in UTF-8"),
    ],
)
def test_texts_that_cannot_be(tmp_path: Path, content: bytes | None, message: str) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", tiny_config())
    text = tmp_path / "text"
    if content is not None:
        text.write_bytes(content)
    for command in (["inspect"], ["convert", str(tmp_path / "out")]):
        arguments = [command[0], str(tmp_path / "model"), *command[1:], "--text", str(text)]
        run = CliRunner().invoke(app, arguments)
        assert run.exit_code == 1
        assert run.stderr.startswith(f"error: --text {text}: {message}")
    assert not (tmp_path / "out").exists()


def test_commands(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", tiny_config())
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "model")])
    assert (run.exit_code, "open: nothing" in run.output) == (0, True)
    (tmp_path / "text").write_text(sample_text())
    run = CliRunner().invoke(
        app, ["inspect", str(tmp_path / "model"), "--text", str(tmp_path / "text")]
    )
    assert run.exit_code == UNDECIDED  # random weights: a text says that they know nothing
    assert "perplexity" in run.output
    arguments = ["convert", str(tmp_path / "model"), str(tmp_path / "neox"), "--to", "gpt-neox"]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "from Ropeway's model directory" in " ".join(run.output.split())
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "neox"), "--set", "rotary=3"])
    assert run.exit_code == 1
    assert "--set rotary=3: expected NAME=VALUE with one of" in run.output
    run = CliRunner().invoke(app, ["inspect", str(tmp_path / "neox"), "--set", "rope_base=null"])
    assert run.stderr == "error: --set rope_base=null: null is no value\n"
