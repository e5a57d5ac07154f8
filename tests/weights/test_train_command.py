from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from tests.patience import PATIENCE
from weights.train_command import app

SAMPLE = Path(__file__).parents[2] / "weights" / "sample.txt"
TOY = """
[data]
held_out = 0.1
[tokenizer]
vocab_size = 300
[model]
num_layers = 1
num_heads = 2
hidden_size = 32
intermediate_size = 64
max_position = 32
rotary_dim = 8
[training]
steps = 12
batch_tokens = 128
length = 16
warmup = 2
evaluate_every = 4
"""


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_bytes(SAMPLE.read_bytes()[:20_000])
    (tmp_path / "toy.toml").write_text(TOY, encoding="utf-8")
    return folder


def command(texts: Path, model: Path, *more: str) -> list[str]:
    toy = str(texts.parent / "toy.toml")
    return [str(texts), str(model), "--config", toy, "--device", "cpu", *more]


def train(texts: Path, model: Path, *more: str) -> Result:
    return CliRunner().invoke(app, command(texts, model, *more), catch_exceptions=False)


def losses(model: Path) -> list[float]:
    lines = (model / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_text_in_a_model_that_the_engine_serves_out(texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    result = train(texts, model)
    assert result.exit_code == 0
    assert "held out texts:" in result.stderr
    assert f"Next: ropeway serve {model}" in result.stderr.replace("\n", "")
    assert len(losses(model)) == 12
    assert losses(model)[-1] < losses(model)[0]
    assert (model / "training.png").read_bytes().startswith(b"\x89PNG")
    llm = LLM(model, device="cpu", dtype="float32", kv_memory=2**20)
    (completion,) = llm.generate(["The"], SamplingParams(temperature=0, max_tokens=5))
    assert len(completion.token_ids) == 5


def test_a_run_that_was_stopped_goes_on_exactly(texts: Path, tmp_path: Path) -> None:
    train(texts, tmp_path / "whole")
    toy = texts.parent / "toy.toml"
    toy.write_text(f"{TOY}save_seconds = 0\n", encoding="utf-8")
    stopped = tmp_path / "stopped"
    # The learning rate stays until step 10 of 12: up to there the runs are the same.
    program = (
        "import sys; from weights import train_command, train\n"
        "step = train.Trainer.train_step\n"
        "def until_six(self):\n"
        "    if self.step == 6: raise KeyboardInterrupt\n"
        "    return step(self)\n"
        "train.Trainer.train_step = until_six\n"
        "train_command.app(sys.argv[1:])\n"
    )
    arguments = [sys.executable, "-c", program, *command(texts, stopped)]
    interrupted = subprocess.run(arguments, check=False, capture_output=True)
    assert interrupted.returncode != 0
    assert losses(stopped) == losses(tmp_path / "whole")[:6]
    with pytest.raises(ConfigError, match="holds a run already: --resume goes on"):
        train(texts, stopped)
    assert train(texts, stopped, "--resume").exit_code == 0
    assert losses(stopped) == losses(tmp_path / "whole")


def test_several_processes_train_the_same_model(texts: Path, tmp_path: Path) -> None:
    train(texts, tmp_path / "alone")
    together = tmp_path / "together"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    module = ["--nproc-per-node", "2", "-m", "weights.train_command"]
    subprocess.run(
        [*torchrun, *module, *command(texts, together)], check=True, timeout=2 * PATIENCE
    )
    assert losses(together) == pytest.approx(losses(tmp_path / "alone"), abs=2e-3)
    assert (together / "model.safetensors").exists()


def test_what_cannot_be_trained_is_said(texts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        train(texts, model, "--resume")
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda; got 'tpu'"):
        train(texts, model, "--device", "tpu")
    assert train(texts, model).exit_code == 0
    (texts / "one.txt").write_text("Another text.", encoding="utf-8")
    with pytest.raises(ConfigError, match="has changed since"):
        train(texts, model, "--resume")
