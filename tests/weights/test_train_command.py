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


def disturbed(texts: Path, model: Path, how: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with something done to it first."""
    program = (
        "import os, signal, sys\n"
        "from weights import train_command, whole\nfrom weights.training import train\n"
        f"{how}\ntry: train_command.app(sys.argv[1:])\n"
        "except train_command.RopewayError as error: sys.exit(f'error: {error}')\n"
    )
    arguments = [sys.executable, "-c", program, *command(texts, model, *more)]
    return subprocess.run(arguments, check=False, capture_output=True, text=True)


INTERRUPTED = """
step = train.Trainer.train_step
def in_the_midst(self):
    if self.step == 6: os.kill(os.getpid(), signal.{name})
    return step(self)
train.Trainer.train_step = in_the_midst
"""
KILLED = """
fsync, checkpoints = os.fsync, []
def killed(file):
    checkpoints.append(os.readlink(f"/proc/self/fd/{file}").endswith("ckpt.pt.partial"))
    if sum(checkpoints) == 4:
        os.ftruncate(file, 1000)
        os._exit(9)
    fsync(file)
whole.os.fsync = killed
"""
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_what_is_interrupted_in_the_midst_of_a_step_goes_on_exactly(
    texts: Path, tmp_path: Path, name: str, status: int
) -> None:
    train(texts, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    interrupted = disturbed(texts, stopped, INTERRUPTED.format(name=name))
    assert interrupted.returncode == status
    assert "stopped after step 7: --resume goes on from there" in interrupted.stderr
    assert losses(stopped) == losses(tmp_path / "whole")[:7]
    assert (stopped / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="holds a run already: --resume goes on"):
        train(texts, stopped)
    # without --config: with the settings of the run
    resumed = CliRunner().invoke(
        app, [str(texts), str(stopped), "--resume", "--device", "cpu"], catch_exceptions=False
    )
    assert resumed.exit_code == 0
    assert losses(stopped) == losses(tmp_path / "whole")


def test_what_is_killed_while_it_writes_a_checkpoint_goes_on_exactly(
    texts: Path, tmp_path: Path
) -> None:
    train(texts, tmp_path / "whole")
    (texts.parent / "toy.toml").write_text(f"{TOY}save_seconds = 0\n", encoding="utf-8")
    killed = tmp_path / "killed"
    assert disturbed(texts, killed, KILLED).returncode == 9
    assert (killed / "run" / "ckpt.pt.partial").stat().st_size == 1000
    assert len(losses(killed)) == 4  # one more than the checkpoint has
    assert train(texts, killed, "--resume").exit_code == 0
    assert losses(killed) == losses(tmp_path / "whole")
    lines = (killed / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"loss"' in line for line in lines) == 12  # each step once


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(texts: Path, tmp_path: Path) -> None:
    train(texts, tmp_path / "whole")
    room = (tmp_path / "whole" / "run" / "ckpt.pt").stat().st_size - 1
    model = tmp_path / "model"
    assert disturbed(texts, model, INTERRUPTED.format(name="SIGINT")).returncode == 130
    full = disturbed(texts, model, FULL.format(size=room), "--resume")
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1] == f"error: {model}/run/ckpt.pt: File too large"
    assert [path.name for path in (model / "run").glob("ckpt*")] == ["ckpt.pt"]
    assert train(texts, model, "--resume").exit_code == 0
    assert losses(model) == losses(tmp_path / "whole")


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
    with pytest.raises(ConfigError, match=r"toy.toml/run: Not a directory"):
        train(texts, tmp_path / "toy.toml")
    assert train(texts, model).exit_code == 0
    with pytest.raises(ConfigError, match=r"training.learning_rate was 0.003 when this run began"):
        train(texts, model, "--resume", "--learning-rate", "1")
    with pytest.raises(ConfigError, match=r"steps is 20, and was 12 when the learning rate began"):
        train(texts, model, "--resume", "--steps", "20")
    assert train(texts, model, "--resume").exit_code == 0
    (texts / "one.txt").write_text("Another text.", encoding="utf-8")
    with pytest.raises(ConfigError, match="has changed since"):
        train(texts, model, "--resume")
    (model / "run" / "ckpt.pt").unlink()
    with pytest.raises(ConfigError, match=r"holds a model already .* would write over"):
        train(texts, model)


def configure(texts: Path, old: str, new: str) -> None:
    (texts.parent / "toy.toml").write_text(TOY.replace(old, new), encoding="utf-8")


def test_a_vocabulary_that_the_text_does_not_give_is_refused(texts: Path, tmp_path: Path) -> None:
    (texts / "one.txt").write_text("one two three four " * 50, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"vocab_size must be at most 2\d\d for this text"):
        train(texts, tmp_path / "model")
    configure(texts, "vocab_size = 300", "")
    result = train(texts, tmp_path / "model")
    assert (result.exit_code, "tokens and no more" in result.stderr) == (0, True)
    # a tokenizer that lies there is taken, and is what the settings say
    other = tmp_path / "other"
    other.mkdir()
    for path in (tmp_path / "model").glob("tokenizer*"):
        (other / path.name).write_bytes(path.read_bytes())
    assert f"taking the tokenizer in {other}" in train(texts, other).stderr.replace("\n", "")
    third = tmp_path / "third"
    other.rename(third)
    for path in (third / "run" / "prepared.json", third / "run" / "ckpt.pt"):
        path.unlink()
    (third / "model.safetensors").unlink()
    configure(texts, "vocab_size = 300", "vocab_size = 400")
    with pytest.raises(ConfigError, match=r"vocab_size is 400, and the tokenizer that lies in"):
        train(texts, third)


def test_a_text_of_one_byte_is_too_little(texts: Path, tmp_path: Path) -> None:
    (texts / "one.txt").write_text("a", encoding="utf-8")
    configure(texts, "vocab_size = 300", "")
    with pytest.raises(ConfigError, match="source texts has 2 tokens: too few for a window of 32"):
        train(texts, tmp_path / "model")


def test_shares_name_every_source(texts: Path, tmp_path: Path) -> None:
    (texts / "plays").mkdir()
    (texts / "plays" / "two.txt").write_bytes(SAMPLE.read_bytes()[:5_000])
    configure(texts, "[tokenizer]", "[data.weights]\ntexts = 1\n[tokenizer]")
    with pytest.raises(ConfigError, match=r"data.weights must name every source, and lacks plays"):
        train(texts, tmp_path / "model")
    configure(texts, "[tokenizer]", "[data.weights]\ntexts = 1\nplays = 0\n[tokenizer]")
    assert train(texts, tmp_path / "model").exit_code == 0


def test_nothing_of_a_preparation_that_was_stopped_is_read(texts: Path, tmp_path: Path) -> None:
    left = tmp_path / "model" / "run" / "tokens" / "train"
    left.mkdir(parents=True)
    (left / "old.bin").write_bytes(bytes(4000))
    assert train(texts, tmp_path / "model").exit_code == 0
    assert [path.name for path in left.iterdir()] == ["texts.bin"]
