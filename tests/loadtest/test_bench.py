"""The benchmarks run, offline and over HTTP, and print JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.bench import app, percentile, spread
from loadtest.workload import Measured, Workload


def test_spread_and_percentile() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.95) == 2.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0


def test_measured() -> None:
    measured = Measured(
        started=10.0, seconds=4.0, arrivals={0: [11.0, 12.0, 14.0], 1: [12.0, 13.0]}
    )
    assert measured.tokens_per_s == 5 / 4
    assert measured.first_token_s == [1.0, 2.0]
    assert measured.gaps_s == [1.0, 2.0, 1.0]
    assert measured.decode_tokens_per_s == 1.0  # two tokens in the two seconds after 12


def test_prompts_differ_and_repeat() -> None:
    workload = Workload(streams=2, prompt_tokens=9, output_tokens=4, vocab_size=1000)
    assert workload.prompts(0) == workload.prompts(0)
    assert workload.prompts(0) != workload.prompts(1)
    assert all(0 <= token < 1000 for prompt in workload.prompts(0) for token in prompt)


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["latency", "--no-http"], [("offline", 1)]),
        (["throughput", "--streams", "1,3"], [(p, n) for n in (1, 3) for p in ("offline", "http")]),
    ],
)
def test_commands(
    tiny_model_dir: Path, tmp_path: Path, arguments: list[str], rows: list[tuple[str, int]]
) -> None:
    sizes = ["--prompt-tokens", "8", "--output-tokens", "40", "--repeats", "2", "--threads", "1"]
    path = tmp_path / "out.json"
    result = CliRunner().invoke(
        app, [*arguments, "--model", str(tiny_model_dir), *sizes, "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert json.loads(result.stdout) == document
    assert [(row["path"], row["streams"]) for row in document["results"]] == rows
    for row in document["results"]:
        assert row["tokens_per_s"]["min"] > 0
        assert row["of_read_limit"] > 0
    assert document["machine"]["read_gb_s"] > 0


def test_bad_streams(tiny_model_dir: Path) -> None:
    result = CliRunner().invoke(
        app, ["throughput", "--model", str(tiny_model_dir), "--streams", "1,x"]
    )
    assert result.exit_code == 2
    assert "numbers from 1, by commas, got '1,x'" in result.output
