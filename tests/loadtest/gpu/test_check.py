"""`make gpu-check` as far as it goes without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.model.attention.reference import NaiveAttention
from engine.model.rope import RotaryTable
from loadtest.gpu import check as gpu_check
from loadtest.gpu.peers import hugging_face
from loadtest.gpu.report import Report
from loadtest.gpu.scale import close, same
from tests.models import random_model, tiny_config

ROOT = Path(__file__).parents[3]
ABSENT = "msgspec zmq psutil tiktoken llguidance rich fastapi pydantic typer transformers uvicorn"


def test_a_little_of_everything_holds_under_the_interpreter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert gpu_check.main(["--interpret", "--json", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(path.read_text())
    assert document["failed"] == 0
    names = " ".join(each["name"] for each in document["checks"])
    parts = (
        "attention, bits, profiles, norms, product, sampler, penalties, engine's tokens, "
        "engine by graphs"
    )
    for part in parts.split(", "):
        assert part in names
    figures = {each.pop("name"): each for each in document["figures"]}
    assert [name for name, each in figures.items() if "error" in each] == []
    assert figures["engine, 2 x (4 + 4)"]["tokens_per_s"] > 0
    assert figures["engine, a step of 2 by its sampling, us"]["penalties"] > 0
    assert "recorded" in figures["engine, time to ready"]["graphs"]


def test_it_needs_little() -> None:
    """Not even msgspec: the machine that has a GPU may have nothing else of ours."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}.split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from loadtest.gpu import check as gpu_check
sys.exit(gpu_check.main(["--interpret", "--only", "network's bits"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert [each["passed"] for each in json.loads(done.stdout)["checks"]] == [True]


def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "belong together" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check.knobs.runtime, "interpret", False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "no CUDA device" in capsys.readouterr().err


def test_a_failure_is_said_and_the_next_part_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({})
    expected = torch.zeros(3, 2)
    report.check("far", lambda: close(expected + 1, expected))
    report.check("other bits", lambda: str(same(expected + 1e-9, expected, "rows")))
    report.check("near", lambda: close(expected, expected))
    report.measure("broken", lambda: {"figure": 1 // 0})
    report.measure("whole", lambda: {"figure": 1})
    report.close(None)
    document = json.loads(capsys.readouterr().out)
    assert [each["passed"] for each in document["checks"]] == [False, False, True]
    assert "3 of 3 rows differ" in document["checks"][1]["detail"]
    assert document["failed"] == 2
    assert "ZeroDivisionError" in document["figures"][0]["error"]
    assert document["figures"][1] == {"name": "whole", "figure": 1}


def test_parts_can_be_chosen_by_name() -> None:
    report = Report({}, only="norm")
    report.check("norms", lambda: "good")
    report.check("products", lambda: "good")
    report.measure("norm, ms", lambda: {})
    report.measure("device copy", lambda: {})
    assert [each["name"] for each in report.checks + report.figures] == ["norms", "norm, ms"]


def test_hugging_face_has_the_same_weights() -> None:
    model = random_model(tiny_config())
    naive = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    token_ids = torch.arange(20)
    with torch.inference_mode():
        expected = model.logits(model(token_ids, naive))
        actual = hugging_face(model)(token_ids[None]).logits[0]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
