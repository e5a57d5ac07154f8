from __future__ import annotations

import json
from pathlib import Path

import pytest

from weights.experiments.optimizers import best_rate, main

SAMPLE = Path(__file__).parents[3] / "weights" / "sample.txt"


def test_the_best_learning_rate_is_no_edge_of_what_was_tried() -> None:
    asked = []

    def measure(rate: float) -> float:
        asked.append(rate)
        return abs(rate - 8.0)

    losses = {1.0: 7.0, 2.0: 6.0}
    assert best_rate(losses, measure) == 8.0
    assert asked == [4.0, 8.0, 16.0]
    assert best_rate({8.0: 0.0, 16.0: 8.0}, measure) == 8.0
    assert asked[3:] == [4.0]


def test_both_are_compared_at_equal_steps_and_at_equal_time(tmp_path: Path) -> None:
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    (texts / "sample.txt").write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    folders = ["--corpus", str(texts), "--work", str(tmp_path / "work"), "--out", str(out)]
    small = ["--steps", "20", "--hidden-size", "32", "--length", "32", "--vocab-size", "300"]
    main([*folders, *small, "--seeds", "1", "2"])
    document = json.loads((out / "optimizers.json").read_text())
    muon, equal_steps, equal_time = document["summary"]
    assert muon["steps"] == equal_steps["steps"] == 20
    longer = muon["steps"] * muon["step_ms"] / equal_time["step_ms"]
    assert equal_time["steps"] == round(longer)
    for row, kind in ((muon, "muon"), (equal_steps, "adamw")):
        losses = document["search"][kind]
        assert losses[f"{row['rate']:g}"] == min(losses.values())
        assert row["final_loss"][1] == pytest.approx(min(losses.values()), abs=0.5)
    assert "AdamW, equal time" in (out / "optimizers.md").read_text()
    assert (out / "optimizers.svg").stat().st_size > 1000
