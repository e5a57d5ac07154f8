"""docs/experiments.md shows what the results beside it say; its commands run, on little text."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from weights.corpus.sources import write_documents
from weights.experiments import context, optimizers, positions, xpos

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = (DOCS / "experiments.md").read_text(encoding="utf-8")
NETWORK = ["--hidden-size", "16", "--length", "192", "--vocab-size", "300"]
# What makes a command small, after all that it says itself; {model}: a folder.
SHORT = ["--steps", "2", "--seeds", "1"]
FEW = ["--rounds", "2", "--encodings", "RoPE", "learned absolute", "xPos"]
SMALL = {
    "positions": [*NETWORK, *SHORT, *FEW],
    "context": ["--model", "{model}", "--times", "2", "--texts", "2", "--fine-tune", "1"],
    "xpos": ["--texts", "2", "--times", "2", "--seeds", "1"],
    "optimizers": [*NETWORK, *SHORT],
}


@pytest.mark.parametrize("experiment", [positions, context, xpos, optimizers])
def test_the_tables_are_those_of_the_results(experiment: ModuleType) -> None:
    name = experiment.__name__.rpartition(".")[2]
    document = json.loads((DOCS / "experiments" / f"{name}.json").read_text(encoding="utf-8"))
    shown = experiment.table(document)
    missing = [line for line in shown.splitlines() if line.startswith("|") and line not in PAGE]
    assert not missing
    assert f"experiments/{name}.svg" in PAGE
    picture = (DOCS / "experiments" / f"{name}.svg").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in picture


def commands() -> list[list[str]]:
    """Arguments of every experiment on the page, its name first."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prefix = "python -m weights.experiments."
    told = [shlex.split(line.removeprefix(prefix)) for line in lines if line.startswith(prefix)]
    assert len(told) == len(lines) - 1  # one builds the corpus, out of the network
    assert {name for name, *_ in told} == SMALL.keys()
    return told


def test_every_command_of_the_page_runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "weights" / "sample.txt").read_text(encoding="utf-8")
    for split in ("train", "heldout"):
        write_documents(tmp_path / "corpus" / split / "sample.jsonl", [text])
    for name, *arguments in commands():
        small = [each.format(model=tiny_model_dir) for each in SMALL[name]]
        importlib.import_module(f"weights.experiments.{name}").main([*arguments, *small])
        out = Path(arguments[arguments.index("--out") + 1])
        assert (out / f"{name}.json").stat().st_size
        assert (out / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
