"""The comparison finds nothing where there is nothing, and something where there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.bench import determinism
from loadtest.bench.commands import app
from loadtest.bench.determinism import Load

LOAD = ["--requests", "12", "--prompt-tokens", "100", "--output-tokens", "80", "--threads", "1"]


def test_no_differences(tiny_model_dir: Path) -> None:
    command = ["determinism", "--model", str(tiny_model_dir), "--dtype", "float32", *LOAD]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["compared"], document["differences"]) == (48, 0)
    ways = {way["name"]: way for way in document["ways"]}
    assert list(ways) == ["together", "cached", "chunked", "preempted"]
    assert ways["cached"]["cached_tokens"] > ways["together"]["cached_tokens"]
    assert ways["preempted"]["preemptions"] > 0
    assert "48 requests compared, 0 differences" in result.stderr


def test_differences_are_seen(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = determinism.outcome

    def disturbed(completions: list[determinism.Completion]) -> list[object]:
        first, *rest = outcome(completions)
        return [first, *rest] if len(completions) == 1 else ["one is another", *rest]

    monkeypatch.setattr(determinism, "outcome", disturbed)
    document = determinism.compare(tiny_model_dir, "float32", 1, Load(3, 9, 4, 268))
    assert document["differences"] == 4


def test_half_of_the_prompts_begin_alike() -> None:
    prompts = Load(8, 50, 4, 1000).prompts()
    assert prompts == Load(8, 50, 4, 1000).prompts()
    assert len({tuple(prompt) for prompt in prompts}) == 8
    assert all(1 <= len(prompt) <= 50 for prompt in prompts)
