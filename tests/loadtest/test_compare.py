"""Comparisons: who is there and who is not, turns, ratios, and what peers print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loadtest import compare as comparison
from loadtest.compare import _rows, main
from loadtest.errors import Unmeasurable
from loadtest.peers.base import rotated
from loadtest.peers.llama_cpp import LlamaBatchedBench
from loadtest.workload import Workload

app = typer.Typer()
app.command()(main)

SIZES = ["--prompt-tokens", "8", "--output-tokens", "12", "--prefill-tokens", "40"]


def test_transformers(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours and Hugging Face's on the same tiny weights; what is not installed is named."""
    monkeypatch.setattr(comparison, "_found", lambda name: None)
    path = tmp_path / "out.json"
    options = ["--model", str(tiny_model_dir), "--what", "decode,prefill", "--streams", "1,2"]
    options += [*SIZES, "--repeats", "2", "--threads", "1", "--busy", "--dtype", "float32"]
    result = CliRunner().invoke(app, [*options, "--json", str(path)])
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert json.loads(result.stdout) == document
    rows = [(row["what"], row["streams"], row["engine"]) for row in document["results"]]
    assert rows == [
        ("decode", 1, "ropeway"),
        ("decode", 1, "transformers generate"),
        ("decode", 1, "transformers continuous"),
        ("decode", 2, "ropeway"),
        ("decode", 2, "transformers generate"),
        ("decode", 2, "transformers continuous"),
        ("prefill", 1, "ropeway"),
        ("prefill", 1, "transformers generate"),
    ]
    for row in document["results"]:
        assert row["tokens_per_s"]["min"] > 0
        assert ("ratio" in row) == (row["engine"] != "ropeway")
    assert [each["name"] for each in document["absent"]] == ["llama.cpp offline"]
    assert "absent: llama.cpp offline (no llama-batched-bench on PATH" in result.stderr


def test_ratios_are_taken_within_a_repeat() -> None:
    rows = _rows("decode", 4, {"ropeway": [10.0, 30.0], "a": [5.0, 10.0], "b": []}, {})
    assert [row["engine"] for row in rows] == ["ropeway", "a"]
    assert rows[1]["tokens_per_s"] == {"median": 7.5, "min": 5.0, "max": 10.0}
    assert rows[1]["ratio"] == {"median": 2.5, "min": 2.0, "max": 3.0}


def test_another_one_begins_each_time() -> None:
    assert ["".join(rotated("abc", by)) for by in range(4)] == ["abc", "bca", "cab", "abc"]


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "llama-batched-bench"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_batched_bench_counts_its_second_run(tmp_path: Path) -> None:
    line = '{{"pl": 2, "t": {}, "speed_pp": {}, "speed_tg": 7.5}}'
    printed = "\n".join([line.format(9, 1), "", line.format(4, 100), "", "llama_perf: text"])
    binary = script(tmp_path, f'echo "$@" > {tmp_path}/asked; cat <<X\n{printed}\nX')
    peer = LlamaBatchedBench(binary, tmp_path / "model.gguf", "bf16", 2)
    rates = peer.run(Workload(2, 3, 5, 9), 0)
    assert (rates.tokens_per_s, rates.decode_tokens_per_s) == (2 * 5 / 4, 7.5)
    asked = (tmp_path / "asked").read_text()
    for option in ("-npp 3 ", "-ntg 5 ", "-npl 2,2 ", "-c 16 ", "--threads 2 ", "--flash-attn on"):
        assert option in asked
    assert peer.prefill(64, 0) == 100


def test_batched_bench_that_fails(tmp_path: Path) -> None:
    peer = LlamaBatchedBench(script(tmp_path, "echo no model >&2; exit 3"), tmp_path, "bf16", 2)
    with pytest.raises(Unmeasurable, match=r"ended with status 3 and 0 results: no model"):
        peer.prefill(64, 0)


def test_others_are_refused(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "doubt", lambda load: "others took 1 of 2 cores")
    result = CliRunner().invoke(app, ["--model", str(tiny_model_dir)])
    assert result.exit_code == 1
    assert "others took 1 of 2 cores; or pass --busy" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--what", "decode,train"], 2, "knows decode, prefill, http, not 'train'"),
        (["--peers", "ollama"], 2, "knows llama.cpp, transformers, vllm, not 'ollama'"),
        (["--llama", "q4_0"], 2, "knows f32, bf16, q8_0, not 'q4_0'"),
        (["--vllm", "/nowhere"], 2, "'/nowhere' does not exist"),
        (["--busy", "--prefill-tokens", "500"], 1, "500 tokens do not fit a context of 192"),
    ],
)
def test_bad_options(tiny_model_dir: Path, options: list[str], status: int, message: str) -> None:
    result = CliRunner().invoke(app, ["--model", str(tiny_model_dir), *options])
    assert result.exit_code == status
    assert message in " ".join(result.output.replace("│", " ").split())
