"""docs/experiments.md shows what the results beside it say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from weights.experiments import context, optimizers, positions, xpos

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("experiment", [positions, context, xpos, optimizers])
def test_the_tables_are_those_of_the_results(experiment: ModuleType) -> None:
    name = experiment.__name__.rpartition(".")[2]
    page = (DOCS / "experiments.md").read_text(encoding="utf-8")
    document = json.loads((DOCS / "experiments" / f"{name}.json").read_text(encoding="utf-8"))
    shown = experiment.table(document)
    missing = [line for line in shown.splitlines() if line.startswith("|") and line not in page]
    assert not missing
    assert f"experiments/{name}.svg" in page
    assert f"python -m weights.experiments.{name}" in page
    picture = (DOCS / "experiments" / f"{name}.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in picture
