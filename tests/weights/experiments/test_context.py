from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from engine import LLM, RequestOptions
from weights.corpus import write_documents
from weights.experiments.context import PARTS, by_position, main, nats, stretches
from weights.experiments.context import engine as one_at_a_time

SAMPLE = Path(__file__).parents[3] / "weights" / "sample.txt"


def test_texts_come_from_all_sources_that_are_long_enough() -> None:
    sources = [list(range(100)), list(range(5)), list(range(1000, 1100))]
    texts = stretches(sources, 20, 4)
    assert [len(text) for text in texts] == [21] * 4
    assert [text[0] for text in texts] == [0, 1000, 39, 1039]
    with pytest.raises(ValueError, match="no held-out source has more than 200 tokens"):
        stretches(sources, 200, 1)


def test_perplexity_by_position_is_that_of_its_stretch() -> None:
    losses = [[float(at // 10) for at in range(10 * PARTS)], [2.0] * (10 * PARTS)]
    assert by_position(losses)[:2] == pytest.approx([math.exp(1.0), math.exp(1.5)])


def test_every_scaling_is_measured_before_and_after_a_fine_tune(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    write_documents(tmp_path / "heldout" / "sample.jsonl", [text])
    write_documents(tmp_path / "train" / "sample.jsonl", [text])
    out = tmp_path / "out"
    model = ["--model", str(tiny_model_dir), "--corpus", str(tmp_path), "--out", str(out)]
    main([*model, "--times", "2", "--texts", "1", "--fine-tune", "1"])
    document = json.loads((out / "context.json").read_text())
    results = document["results"]
    assert {"none", "linear", "ntk", "dynamic", "yarn", "xpos", "shift"} < set(results)
    assert {"linear, fine-tuned", "ntk, fine-tuned", "yarn, fine-tuned"} < set(results)
    assert all(math.isfinite(row["last"]) for row in results.values())
    assert results["none"]["within"] == pytest.approx(results["shift"]["within"], rel=0.02)
    assert (out / "context.png").stat().st_size > 1000
    llm: LLM = one_at_a_time(tiny_model_dir)
    (alone,) = nats(llm, [[1, 2, 3, 4]], None, RequestOptions())
    assert len(alone) == 3
