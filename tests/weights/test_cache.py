"""Checkpoints that are converted when they are served."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from engine.errors import CheckpointError
from server.cli import app
from server.terminal.outcome import INTERRUPTED
from tests.models import write_tokenizer
from tests.patience import PATIENCE
from tests.server.processes.test_serve import serve
from tests.weights.checkpoints import logits, make, nanogpt_args, rename
from weights import cache as conversions
from weights.cache import Wanted, servable
from weights.formats.known import NANOGPT

DECLARED = ("pairing=half", "rope_sign=1", "rope_base=10000", "rotary_dim=16")
DECLARED += ("qkv_layout=stacked",)


def console() -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, width=200), said


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of nanoGPT with a tokenizer beside it."""
    config, tensors = make(tmp_path / "model")
    run = tmp_path / "run"
    run.mkdir()
    write_tokenizer(run)
    save(run / "ckpt.pt", rename(tensors, NANOGPT, config), nanogpt_args(config))
    return run / "ckpt.pt"


def save(path: Path, state: dict[str, Tensor], args: dict[str, object]) -> None:
    torch.save({"model": state, "model_args": args}, path)


def never(job: str) -> None:
    raise AssertionError(f"converted again: {job}")


def test_converted_once(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    wanted = Wanted(trained, declared=DECLARED)
    shown, said = console()
    directory = servable(wanted, cache, shown)
    assert directory.name == "ckpt"
    assert directory.is_relative_to(cache)
    assert torch.equal(logits(directory), logits(tmp_path / "model"))
    assert f"converting to {directory.parent}" in said.getvalue()
    assert re.search(r"pairing\W+half\W+declared", said.getvalue())

    monkeypatch.setattr(conversions, "_run", never)
    shown, said = console()
    assert servable(wanted, cache, shown) == directory
    assert f"converted before, to {directory}; pairing half (declared)" in said.getvalue()


def test_a_checkpoint_that_was_trained_on(trained: Path, tmp_path: Path) -> None:
    """Even where its size and its time of modification are the old ones."""
    cache = tmp_path / "cache"
    wanted = Wanted(trained, declared=DECLARED)
    before = servable(wanted, cache, console()[0])
    there = trained.stat()
    content = torch.load(trained, weights_only=True)
    content["model"]["transformer.wte.weight"] += 1.0
    torch.save(content, trained)
    os.utime(trained, ns=(there.st_atime_ns, there.st_mtime_ns))
    assert trained.stat().st_size == there.st_size
    shown, said = console()
    after = servable(wanted, cache, shown)
    assert after != before
    assert not torch.equal(logits(after), logits(before))
    assert f"older conversions of it take 0.4 MB: rm -r {before.parent}\n" in said.getvalue()


def test_what_is_declared_counts(trained: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, other = (
        servable(Wanted(trained, declared=(f"pairing={pairing}", *DECLARED[1:])), cache, each)
        for pairing, each in (("half", console()[0]), ("interleaved", console()[0]))
    )
    assert not torch.equal(logits(one), logits(other))


def test_a_model_directory_is_served_as_it_is(tmp_path: Path) -> None:
    make(tmp_path / "model")
    cache = tmp_path / "cache"
    assert servable(Wanted(tmp_path / "model"), cache, console()[0]) == tmp_path / "model"
    assert not cache.exists()
    with pytest.raises(CheckpointError, match="--set and --text are for checkpoints of other"):
        servable(Wanted(tmp_path / "model", declared=DECLARED), cache, console()[0])


def test_without_a_clear_margin_nothing_is_served(trained: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    wanted = Wanted(trained, declared=DECLARED[1:])
    with pytest.raises(CheckpointError) as refused:
        servable(wanted, cache, console()[0])
    for words in ("leave pairing open", "(--set pairing=...)", f"`ropeway inspect {trained}`"):
        assert words in str(refused.value)
    assert list(cache.iterdir()) == []
    arguments = ["serve", str(trained), "--cache-dir", str(cache), "--port", "0"]
    for option in DECLARED[1:]:
        arguments += ["--set", option]
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 1
    assert run.stderr.endswith(f"error: {refused.value}\n")


def test_a_cache_that_cannot_be(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written: .*\(--cache-dir\)"):
        servable(Wanted(trained, declared=DECLARED), tmp_path / "file" / "x", console()[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_conversion_leaves_nothing(
    trained: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Everything is open, so that it takes a while; a killed parent takes its child along."""
    cache = tmp_path / "cache"
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from weights.cache import Wanted, servable\n"
        "servable(Wanted(Path(sys.argv[1])), Path(sys.argv[2]), Console())"
    )
    command = [sys.executable, "-c", script, str(trained), str(cache)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    waited(lambda: cache.is_dir() and any(cache.rglob("*.partial/*")))
    process.send_signal(number)
    assert process.wait(PATIENCE) != 0
    waited(lambda: not any(cache.iterdir()))


def test_an_interrupted_convert_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "convert", str(trained), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    waited((tmp_path / "out.partial").is_dir)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == INTERRUPTED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def waited(condition: object, seconds: float = PATIENCE) -> None:
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_over_http(trained: Path, tmp_path: Path) -> None:
    """The real command, twice: the second start converts nothing."""
    arguments = ["--kv-memory", "4MiB", "--cache-dir", str(tmp_path / "cache")]
    for option in DECLARED:
        arguments += ["--set", option]
    texts = []
    for words in ("converting to", "converted before, to"):
        with serve(trained, *arguments) as server:
            body = {"prompt": "the", "max_tokens": 8, "temperature": 0, "stream": False}
            url = f"{server.url}/generate"
            texts.append(
                httpx.post(url, json=body, trust_env=False, timeout=PATIENCE).json()["text"]
            )
            server.process.send_signal(signal.SIGINT)
            status, errors = server.end()
        assert status == 0
        assert words in errors
    assert texts[0] == texts[1] != ""
