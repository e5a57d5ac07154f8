from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from engine.scaling import RopeScaling
from weights.corpus import write_documents
from weights.experiments.context import main
from weights.experiments.stretch import PARTS, Way, by_position, engine, stretches

SAMPLE = Path(__file__).parents[3] / "weights" / "sample.txt"


def test_texts_come_from_all_sources_that_are_long_enough() -> None:
    counts = (range(100), range(5), range(1000, 1100))
    sources = [np.array(each, dtype=np.uint16) for each in counts]
    texts = stretches(sources, 20, 4)
    assert [len(text) for text in texts] == [20] * 4
    assert [text[0] for text in texts] == [0, 1000, 40, 1040]
    with pytest.raises(ValueError, match="no held-out source has 200 tokens"):
        stretches(sources, 200, 1)


def test_loss_by_position_is_that_of_its_stretch() -> None:
    losses = [[float(at // 10) for at in range(10 * PARTS)], [2.0] * (10 * PARTS)]
    first, second = by_position(losses)
    assert first == list(range(PARTS))
    assert second == [2.0] * PARTS


def test_dynamic_is_scored_as_it_would_be_generated(tiny_model_dir: Path) -> None:
    """Each token under the factor of the length that ends with it, as `in_force` gives it."""
    llm = engine(tiny_model_dir)
    trained = llm.info.max_position
    dynamic = RopeScaling(type="dynamic", factor=4)
    text = [at % 50 for at in range(3 * trained)]
    (nats,) = Way("dynamic", dynamic).nats(llm, [text], trained)
    assert len(nats) == len(text) - 1
    for end in (trained // 2, trained + 7, 3 * trained):
        fixed = Way("", dynamic.in_force(end, trained))
        if end <= trained:
            fixed = Way("")
        (expected,) = fixed.nats(llm, [text[:end]], trained)
        assert nats[end - 2] == pytest.approx(expected[-1], rel=1e-5)


def test_every_scaling_is_measured_before_and_after_a_fine_tune(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    for split in ("heldout", "train"):
        write_documents(tmp_path / "corpus" / split / "sample.jsonl", [text])
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = ["--model", str(tiny_model_dir), "--corpus", str(tmp_path / "corpus")]
    arguments += ["--out", str(out), "--work", str(work), "--times", "2", "--texts", "2"]
    main(arguments)
    assert "fine-tuned" not in (out / "context.json").read_text()
    main([*arguments, "--fine-tune", "1"])
    document = json.loads((out / "context.json").read_text())
    results = document["results"]
    as_it_is = {"shift", "none", "linear", "ntk", "dynamic", "yarn"}
    tuned = {f"{way}, fine-tuned" for way in ("none", "linear", "yarn")}
    assert set(results) == as_it_is | tuned
    rows = {row["way"]: row for row in document["summary"]}
    assert all(math.isfinite(row["last"]) for row in rows.values())
    # within the trained context neither of these does anything
    assert rows["none"]["within"] == rows["shift"]["within"] == rows["dynamic"]["within"]
    assert rows["shift"]["beyond_to_shift"] == [1, 1, 1]
    assert rows["linear, fine-tuned"]["within"] != rows["linear"]["within"]
    assert (out / "context.svg").read_text().startswith("<?xml")
