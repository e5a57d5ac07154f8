"""A small chaos over real sockets and processes; and that its verdict can be FAIL."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from loadtest.bench.chaos import Plan, Round, is_flat, verdict
from loadtest.bench.commands import app
from loadtest.bench.victim import Footprint

LOAD = ["--streams", "16", "--rounds", "1", "--kills", "1", "--max-num-seqs", "6"]
SIZES = ["--prompt-tokens", "60", "--output-tokens", "60"]


def test_small(tiny_model_dir: Path) -> None:
    """Clients leave and read slowly, the engine is killed, the pool is too small."""
    command = ["chaos", "--model", str(tiny_model_dir), "--dtype", "float32", *LOAD, *SIZES]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["verdict"], document["failed"]) == ("PASS", [])
    (only,) = document["rounds"]
    assert only["kills"] == 1
    assert only["done"] + only["disconnected"] == document["compared"] == 16
    assert "PASS: 1 rounds, 16 outputs compared" in result.stderr


def test_every_tenth_request_outgrows_the_context() -> None:
    plan = Plan(20, 1, 0, 3, prompt_tokens=30, output_tokens=20, max_num_seqs=4)
    bodies = plan.bodies(range(50), 100)
    assert bodies == plan.bodies(range(50), 100)
    assert bodies != replace(plan, seed=4).bodies(range(50), 100)
    shifting = [body for body in bodies if "overflow" in body]
    assert len(shifting) == 2
    assert all(92 < len(body["prompt"]) <= 100 for body in shifting)


def test_flat_or_not() -> None:
    assert is_flat([80.0, 120, 121, 122, 121, 123, 122, 123, 124, 124])
    assert not is_flat([80.0, 100, 110, 120, 130, 140, 150, 160, 170, 180])


QUIET = Round(1.0, 5, 1, 50, 1, 0, 0, [], {}, 0, Footprint(100.0, 400.0, 20))


def test_verdict_names_what_is_left() -> None:
    assert verdict([QUIET] * 6, 0) == []
    assert verdict([QUIET, replace(QUIET, left={"kv_blocks_used": 2.0})], 0) == [
        "round 2: kv_blocks_used is 2 in the end"
    ]
    assert verdict([replace(QUIET, tasks=3)], 0) == ["round 1: 3 tasks are left"]
    assert verdict([replace(QUIET, faults=["stream 1 (slow): x"])], 1) == [
        "round 1: stream 1 (slow): x",
        "the server stopped with status 1",
    ]
    growing = [replace(QUIET, footprint=Footprint(100.0, 400.0, 20 + 5 * at)) for at in range(6)]
    assert verdict(growing, 0) == ["http_files grows: 20, 25, 30, 35, 40, 45"]
