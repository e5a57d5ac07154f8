"""The benchmarks run, offline and over HTTP, print JSON and a table, and refuse what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.bench.commands import app
from loadtest.bench.options import DEFAULT_MODEL
from loadtest.servers import ropeway

TINY = ["--threads", "1", "--repeats", "2"]
SHORT = ["--prompt-tokens", "8", "--output-tokens", "40"]


def run(model: Path, tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON, which is the same on standard output and in the file; and the table."""
    path = tmp_path / "out.json"
    command, *options = arguments
    result = CliRunner().invoke(
        app, [command, "--model", str(model), *options, *TINY, "--json", str(path)]
    )
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(path.read_text())
    assert json.loads(result.stdout) == document
    assert document["command"] == command
    assert document["repeats"] == 2
    assert document["machine"]["read_gb_s"] > 0
    assert document["machine"]["gemm_float32_gflop_s"] > 0
    assert document["machine"]["gemm_bfloat16_gflop_s"] > 0
    assert document["load"]["others_cores"] >= 0
    return document, result.stderr


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["latency", "--no-http"], [("offline", 1)]),
        (["throughput", "--streams", "1,3"], [(p, n) for n in (1, 3) for p in ("offline", "http")]),
    ],
)
def test_streams(
    tiny_model_dir: Path, tmp_path: Path, arguments: list[str], rows: list[tuple[str, int]]
) -> None:
    document, table = run(tiny_model_dir, tmp_path, *arguments, *SHORT)
    assert [(row["path"], row["streams"]) for row in document["results"]] == rows
    for row in document["results"]:
        rate = row["tokens_per_s"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
        assert row["of_read_limit"] > 0
    assert "decode tokens/s" in table
    assert document["model"]["name"] in table


def test_prefill(tiny_model_dir: Path, tmp_path: Path) -> None:
    document, table = run(tiny_model_dir, tmp_path, "prefill", "--prompt-tokens", "8,150")
    assert [row["prompt_tokens"] for row in document["results"]] == [8, 150]
    for row in document["results"]:
        wanted = row["tokens_per_s"]["median"] / row["limit_tokens_per_s"]
        assert row["of_limit"] == pytest.approx(wanted, rel=0.02, abs=0.001)
    assert "of limit" in table


def test_serve_starts_a_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    document, table = run(tiny_model_dir, tmp_path, "serve", "--streams", "1,3", *SHORT)
    assert [row["what"] for row in document["results"]] == [
        "streams",
        "streams",
        "nothing arrives",
        "191 tokens arrive",  # of 1,000 that were asked for: the context holds no more
    ]
    alone, together, undisturbed, disturbed = document["results"]
    for row in (alone, together):
        assert row["first_token_ms_p95"]["median"] >= row["first_token_ms"]["median"] > 0
    for row in (undisturbed, disturbed):
        assert row["streams"] == 3
        assert row["gap_ms_longest"]["min"] > 0
    memory = document["memory"]
    assert memory["peak_bytes"] == sum(
        memory[each] for each in ("weight_bytes", "cache_bytes", "others_bytes")
    )
    assert memory["peak_bytes"] > 50_000_000
    assert "memory: weights" in table


def test_serve_uses_a_running_server(tiny_model_dir: Path, tmp_path: Path) -> None:
    with ropeway(tiny_model_dir, "--threads", "1") as server:
        document, _ = run(
            tiny_model_dir, tmp_path, "serve", "--url", server.url, "--streams", "2", *SHORT
        )
    assert document["server"] == server.url
    assert "memory" not in document


def test_queue(tmp_path: Path) -> None:
    """With the shipped model: streams of the tiny one end before five others wait."""
    sizes = ["--prompt-tokens", "8", "--output-tokens", "300", "--streams", "2"]
    document, _ = run(DEFAULT_MODEL, tmp_path, "queue", "--waiting", "0,5", *sizes)
    none, five = document["results"]
    assert (none["waiting"], five["waiting"]) == (0, 5)
    assert none["of_none_waiting"] == 1
    wanted = five["decode_tokens_per_s"]["median"] / none["decode_tokens_per_s"]["median"]
    assert five["of_none_waiting"] == pytest.approx(wanted, abs=0.01)


def test_queue_needs_time(tiny_model_dir: Path) -> None:
    sizes = ["--prompt-tokens", "8", "--output-tokens", "4", "--streams", "1", "--waiting", "50"]
    result = CliRunner().invoke(app, ["queue", "--model", str(tiny_model_dir), *sizes, *TINY])
    assert result.exit_code == 1
    assert "ask for more output tokens" in result.output


def test_startup(tiny_model_dir: Path, tmp_path: Path) -> None:
    document, table = run(tiny_model_dir, tmp_path, "startup")
    seconds = {row["what"]: row["seconds"]["median"] for row in document["results"]}
    assert seconds["first token"] >= seconds["ready"] > seconds["import torch"] / 2 > 0
    assert "ready" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["throughput", "--streams", "1,x"], "must be numbers from 1, by commas, got '1,x'"),
        (["throughput", "--streams", "0"], "must be different numbers from 1, by commas, got '0'"),
        (["throughput", "--streams", "2,2"], "must be different numbers from 1"),
        (["prefill", "--prompt-tokens", ""], "must be numbers from 1, by commas, got ''"),
        (["queue", "--waiting", "-1"], "must be numbers from 0, by commas, got '-1'"),
        (["latency", "--dtype", "float16"], "float16"),
        (["startup", "--repeats", "0"], "Invalid value for '--repeats'"),
    ],
)
def test_bad_options(tiny_model_dir: Path, arguments: list[str], message: str) -> None:
    command, *options = arguments
    result = CliRunner().invoke(app, [command, "--model", str(tiny_model_dir), *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_unreachable(tiny_model_dir: Path, url: str) -> None:
    result = CliRunner().invoke(
        app, ["serve", "--model", str(tiny_model_dir), "--url", url, *SHORT]
    )
    assert result.exit_code == 1
    assert f"no server can be reached at {url}" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["--prompt-tokens", "190", "--output-tokens", "40"], "is 230; the model's context is 192"),
        (["--prompt-tokens", "8", "--output-tokens", "8"], "output_tokens must exceed 8, got 8"),
    ],
)
def test_serve_refuses_sizes(tiny_model_dir: Path, sizes: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", str(tiny_model_dir), *sizes])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
