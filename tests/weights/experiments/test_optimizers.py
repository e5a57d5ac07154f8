from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from weights.corpus.tokens import Mixture
from weights.experiments.optimizers import Comparison, compare, panels, table
from weights.experiments.picture import draw
from weights.experiments.search import best_number
from weights.experiments.small import Plan, Run


def test_the_best_learning_rate_is_no_edge_of_what_was_tried() -> None:
    asked = []

    def measure(rate: float) -> float:
        asked.append(rate)
        return abs(rate - 8.0)

    losses = {1.0: 7.0, 2.0: 6.0}
    assert best_number(losses, measure) == 8.0
    assert asked == [4.0, 8.0, 16.0]
    assert best_number({8.0: 0.0, 16.0: 8.0}, measure) == 8.0
    assert asked[3:] == [4.0]
    assert best_number({8.0: 0.0, 16.0: 8.0}, measure, least=8.0) == 8.0
    assert asked[4:] == []


BEST = {"muon": 8e-3, "adamw": 1e-3}
MS = {"muon": 30.0, "adamw": 20.0}


class Known:
    """A laboratory whose losses are known: 5 + seed / 100 + 3 / steps, more off the best rate."""

    def run(self, name: str, seed: int, plan: Plan, title: str | None = None) -> dict[str, Any]:
        away = abs(plan.learning_rate - BEST[plan.optimizer])
        end = 5 + seed / 100 + 3 / plan.steps + away
        return {
            "of": {"encoding": name, "seed": seed, "plan": asdict(plan)},
            "held_out": {"0": 7.0, str(plan.steps // 2): 6.0, str(plan.steps): end},
            "step_ms": [MS[plan.optimizer]] * plan.steps,
        }


def test_both_are_compared_at_equal_steps_and_at_equal_time(tmp_path: Path) -> None:
    plan = Plan(steps=20)
    results = compare(Comparison(Known(), plan), [1, 2])
    muon, equal_steps, equal_time = results["summary"]
    assert (muon["rate"], equal_steps["rate"], equal_time["rate"]) == (8e-3, 1e-3, 1e-3)
    assert (muon["steps"], equal_steps["steps"], equal_time["steps"]) == (20, 20, 30)
    assert muon["final_loss"] == [pytest.approx(5.165), pytest.approx(5.16), pytest.approx(5.17)]
    assert equal_time["final_loss"][0] == pytest.approx(5.115)
    assert set(results["search"]["adamw"]) == {"0.0005", "0.001", "0.002", "0.004", "0.008"}
    document = {"plan": asdict(plan), "seeds": [1, 2], **results}
    assert "| AdamW, equal time | 0.001 | 30 | 20 | 5.115 (5.110 to 5.120) |" in table(document)
    (panel,) = panels(document)
    assert panel.curves["AdamW, equal time, 30 steps"].at == [0.3, 0.6]
    draw([panel], tmp_path / "picture.svg")
    assert "prefers-color-scheme: dark" in (tmp_path / "picture.svg").read_text()


def test_muon_has_the_matrices_of_the_layers() -> None:
    plan = Plan(vocab_size=300, hidden_size=32, length=16, steps=2, optimizer="muon")
    run = Run("RoPE", 1, plan)
    muon, adamw = run.optimizer.parts
    assert isinstance(muon, torch.optim.Muon)
    assert len(muon.param_groups[0]["params"]) == 4 * plan.num_layers
    assert all(p.ndim != 2 or 300 in p.shape for p in adamw.param_groups[0]["params"])
    sources = {"counting": torch.arange(100).to(torch.uint16).numpy()}
    before = muon.param_groups[0]["params"][0].clone()
    run.train_step(0, Mixture(sources, {"counting": 1.0}, 1))
    assert not torch.equal(before, muon.param_groups[0]["params"][0])
