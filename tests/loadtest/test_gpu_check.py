"""`make gpu-check` as far as it goes without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.model.attention.reference import NaiveAttention
from engine.model.rope import RotaryTable
from loadtest import gpu_check
from loadtest.gpu_benchmark import hugging_face
from loadtest.gpu_correctness import close, same
from loadtest.gpu_report import Report
from tests.models import random_model, tiny_config


def test_the_correctness_half_holds_under_the_interpreter(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    assert gpu_check.main(["--interpret", "--json", str(path)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads(path.read_text())
    assert document["failed"] == 0
    names = " ".join(each["name"] for each in document["checks"])
    for part in ("attention", "bits", "profiles", "norms", "product", "sampler", "engine's tokens"):
        assert part in names
    assert document["figures"] == []


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
