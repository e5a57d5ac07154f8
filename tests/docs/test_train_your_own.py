"""Runs the commands of docs/train-your-own.md in their order, on little text and for few steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "train-your-own.md").read_text(encoding="utf-8")
# What makes a command small; everything else of it is run as it stands.
SMALL = {
    "--minutes 30": "--steps 4 --config toy.toml",
    "--config my.toml": "--config my.toml --steps 4",
    "ropeway serve my-model": "ropeway serve my-model --port 0",
}
TOY = """
[tokenizer]
vocab_size = 300
[model]
num_layers = 1
num_heads = 2
hidden_size = 32
intermediate_size = 64
max_position = 128
rotary_dim = 8
[training]
batch_tokens = 512
"""
INSTALL = "pip install 'ropeway[train]'"  # what ran this test has done it


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line != INSTALL]


def arguments(command: str) -> list[str]:
    for whole, small in SMALL.items():
        command = command.replace(whole, small)
    program, *rest = shlex.split(command)
    modules = {"ropeway": ["-m", "server.cli"], "torchrun": ["-m", "torch.distributed.run"]}
    return [sys.executable, *modules[program], *rest]


def answers(process: subprocess.Popen[str]) -> str:
    """The text that a server just started gives, whose address it prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if address := re.search(r"http://[\d.]+:\d+", line):
            body = {"prompt": "The", "max_tokens": 3, "stream": False}
            reply = httpx.post(f"{address[0]}/generate", json=body, timeout=60)
            reply.raise_for_status()
            text: str = reply.json()["text"]
            return text
    raise AssertionError("the server ended without an address")


def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    sample = (ROOT / "weights" / "sample.txt").read_bytes()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(sample)
    (tmp_path / "toy.toml").write_text(TOY, encoding="utf-8")
    (settings,) = blocks("toml")
    settings = re.sub(r"max_position = \d+", "max_position = 64", settings)
    settings = re.sub(r"vocab_size = \d+", "vocab_size = 400", settings)
    settings = re.sub(r"num_layers = \d+", "num_layers = 1", settings)
    settings = re.sub(r"batch_tokens = \d+", "batch_tokens = 256", settings)
    (tmp_path / "my.toml").write_text(settings, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert len(commands()) == 7
    for command in commands():
        process = subprocess.Popen(
            arguments(command),
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if "--resume" in command:
            # the four steps are done: going on finds nothing left to do, and says so by ending
            assert (tmp_path / "my-model" / "run" / "ckpt.pt").exists()
        if " serve " in command:
            assert isinstance(answers(process), str)
            process.terminate()
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{command}: {said}"
    assert (tmp_path / "my-model" / "training.png").exists()
    assert (tmp_path / "my-neox" / "model.safetensors").exists()
