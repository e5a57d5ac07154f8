"""`bench grammar` measures outputs that obey."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine import LLM
from loadtest.bench.grammars import GRAMMARS, _run
from loadtest.workload import Workload
from tests.loadtest.bench.test_commands import run


def test_every_grammar_beside_none(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ["--streams", "1,3", "--output-tokens", "24"]
    document, table = run(tiny_model_dir, tmp_path, "grammar", *options)
    rows: list[dict[str, Any]] = document["results"]
    assert [(row["streams"], row["grammar"]) for row in rows] == [
        (streams, name) for streams in (1, 3) for name in ("none", "json_schema", "regex")
    ]
    for row in rows:
        step = row["step_ms"]
        assert 0 < step["min"] <= step["median"] <= step["max"]
        bound = row["grammar"] != "none"
        assert ("added_ms" in row) == ("masks_ms" in row) == bound
        if bound:
            assert 0 < row["mask_us"] <= row["mask_us_p95"]
            assert row["masks_ms"] > 0
    assert "masks of a step ms" in table


def test_what_is_measured_obeys_to_its_last_token(tiny_model_dir: Path) -> None:
    llm = LLM(tiny_model_dir, dtype="float32", threads=1)
    texts = {}
    for name, grammar in GRAMMARS.items():
        measured, outputs = _run(llm, Workload(2, 4, 40, len(llm.tokenizer)), 0, grammar)
        assert [len(output) for output in outputs] == [40, 40]
        assert len(measured.gaps_s) == 2 * 39
        texts[name] = [llm.tokenizer.decode(output) for output in outputs]
    for text in texts["json_schema"]:
        assert re.match(r'\[\{"name":"', text)
    for text in texts["regex"]:
        assert re.fullmatch(r"[A-Z][A-Za-z .?!]*", text)
    assert not any(re.match(r"\[\{", text) for text in texts["none"])
