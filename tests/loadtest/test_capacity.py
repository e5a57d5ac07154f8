"""Replicas for a load, against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.capacity import Load, Measured, app, best, plan

# A stream's 100 outputs take 100 / 500 = 0.2 s of the replica to decode and 100 / 400 = 0.25 s with
# its prompt of 200: so 2 ms an output token and 0.25 ms a prompt token.
RUN = Measured(10, 200, 100, tokens_per_s=400, decode_tokens_per_s=500, gap_ms_p95=30)


def test_costs_of_a_token() -> None:
    assert RUN.decode_s == pytest.approx(0.002)
    assert RUN.prefill_s == pytest.approx(0.00025)


def test_replicas() -> None:
    found = plan(RUN, Load(rate=8.0, prompt_tokens=200, output_tokens=100), utilisation=1.0)
    assert (found.replicas, found.capacity) == (2, pytest.approx(4.0))  # 8 * 0.25 s
    assert found.utilisation == pytest.approx(1.0)
    # Little: 4 requests/s of 100 tokens, 20 ms each at 10 streams.
    assert found.streams == pytest.approx(8.0)
    assert plan(RUN, Load(8.0, 200, 100), 0.7).replicas == 3  # 2 / 0.7 = 2.86
    assert plan(RUN, Load(8.0, 200, 100, cached_share=1.0), 1.0).capacity == pytest.approx(5.0)
    assert plan(RUN, Load(8.0, 400, 100), 1.0).capacity == pytest.approx(1 / 0.3)


def test_the_most_streams_within_the_bound() -> None:
    slow = Measured(32, 200, 100, 800, 1000, gap_ms_p95=60)
    assert best([RUN, slow], 50) is RUN
    assert best([RUN, slow], 60) is slow
    with pytest.raises(ValueError, match="the least is 30 ms"):
        best([RUN, slow], 20)


def test_the_command(tmp_path: Path) -> None:
    def figure(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    row = {"path": "http", "streams": 10, "prompt_tokens": 200, "output_tokens": 100}
    row |= {"tokens_per_s": figure(400), "decode_tokens_per_s": figure(500)}
    row |= {"gap_ms_p95": figure(30)}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"results": [row | {"path": "offline"}, row]}))
    arguments = ["--rate", "8", "--prompt-tokens", "200", "--output-tokens", "100"]
    shown = CliRunner().invoke(app, [str(path), *arguments])
    assert shown.output.startswith("4 replicas (3 and 1 spare): each carries 4.0 such requests/s")
    path.write_text("{}")
    refused = CliRunner().invoke(app, [str(path), *arguments])
    assert refused.exit_code == 2
    assert "cannot be used" in refused.output
