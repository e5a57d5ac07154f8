from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.scaling import RopeScaling, ScalingType
from weights.corpus.sources import write_documents
from weights.experiments.context import BASELINE, main, summarise
from weights.experiments.stretch import (
    PARTS,
    Way,
    between,
    by_position,
    engine,
    scaled,
    stretches,
    unscaled_copy,
)

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


def test_what_factors_are_chosen_by_is_no_text_that_is_reported() -> None:
    sources = [np.array(each, dtype=np.uint16) for each in (range(100), range(1000, 1050))]
    reported = stretches(sources, 10, 4)
    assert [text[0] for text in reported] == [0, 1000, 45, 1020]
    others = between(sources, 10, 4)
    # the second source has 20 tokens from one text to the next: just enough
    assert [text[0] for text in others] == [22, 1010, 67, 1030]
    assert not set(chain(*reported)) & set(chain(*others))
    with pytest.raises(ValueError, match="room for 30 tokens between each two of the texts"):
        between(sources, 30, 4)


def test_a_fine_tuned_way_is_told_against_shift_after_as_much_tuning() -> None:
    def result(beyond: float) -> dict[str, list[object]]:
        return {"within": [1.0], "beyond": [beyond], "by_position": [[beyond] * PARTS]}

    results = {BASELINE: result(3.0), "none": result(4.0)}
    results |= {f"{BASELINE}, fine-tuned": result(2.0), "none, fine-tuned": result(2.5)}
    ratios = {row["way"]: row["beyond_to_shift"][0] for row in summarise(results)}
    assert ratios["none"] == pytest.approx(math.e, abs=1e-3)
    assert ratios["none, fine-tuned"] == pytest.approx(math.exp(0.5), abs=1e-3)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_a_scaling_is_of_the_trained_context_whatever_the_model_declares(
    kind: ScalingType, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """So that any factor may be tried: the same losses where the factor is great enough."""
    llm = engine(tiny_model_dir)
    trained = llm.info.max_position
    text = [at % 50 for at in range(2 * trained)]
    expected = Way("", RopeScaling.from_dict({"type": kind, "factor": 4})).nats(
        llm, [text], trained
    )
    far = engine(unscaled_copy(tiny_model_dir, tmp_path, 2))
    (nats,) = scaled(kind, 4, trained).nats(far, [text], trained)
    assert nats == pytest.approx(expected[0], rel=1e-6)
    assert len(scaled(kind, 1, trained).nats(far, [text], trained)[0]) == 2 * trained - 1


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
    rows = {row["way"]: row for row in document["summary"]}
    assert document["results"].keys() == rows.keys()
    names = [name.split(", ")[0] for name in rows if "fine-tuned" not in name]
    assert names == ["shift", "none", "linear", "ntk", "dynamic", "yarn"]
    tuned = [name for name in rows if "fine-tuned" in name]
    assert [name.split(", ")[0] for name in tuned] == ["shift", "linear", "yarn", "ntk", "none"]
    for kind in ("linear", "ntk", "dynamic", "yarn"):
        losses = {float(factor): nats for factor, nats in document["search"][kind].items()}
        best = min(losses, key=losses.__getitem__)
        assert f"{kind}, factor {best if best > 1 else 2:g}" in rows
        assert best == 1 or min(losses) < best < max(losses)
    assert all(math.isfinite(row["last"]) for row in rows.values())
    # within the trained context neither of these does anything
    assert rows["none"]["within"] == rows["shift"]["within"]
    assert rows["shift"]["beyond_to_shift"] == rows["shift, fine-tuned"]["beyond_to_shift"]
    assert rows["shift, fine-tuned"]["within"] != rows["shift"]["within"]
    assert (out / "context.svg").read_text().startswith("<?xml")
    with pytest.raises(SystemExit):
        main([*arguments, "--tune", "linear"])
    with pytest.raises(ConfigError, match="is of other texts or steps"):
        main([*arguments, "--fine-tune", "2"])
