"""Windows of the same tokens, scored anew and by a cache that shifts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from engine.frontend.tokenizer import Tokenizer
from engine.model.attention.reference import NaiveAttention
from engine.model.loader import load_model
from engine.model.rope import RotaryTable
from loadtest.bench.commands import app
from loadtest.bench.quality import windows
from tests.engine.test_shift import CONFIG, short_model


def test_windows_score_each_token_once() -> None:
    for num_tokens in (101, 150, 163):
        for stride in (1, 7, 10):
            all_of = list(windows(num_tokens, 90, stride))
            assert [at for _, first, end in all_of for at in range(first, end)] == list(
                range(91, num_tokens)
            )
            assert {first - begin for begin, first, _ in all_of} == {91 - stride}
            # one more than the context, since the last token is not computed
            assert max(end - begin for begin, _, end in all_of) == 91


@pytest.mark.parametrize("stride", [16, 5])
def test_anew_is_a_full_recompute(tmp_path: Path, stride: int) -> None:
    """Against attention without pages over each window."""
    model = load_model(short_model(tmp_path), torch.float32)
    rng = random.Random(6)
    text = "".join(rng.choice("abcdefgh the in er") for _ in range(300))
    (tmp_path / "text").write_text(text)
    command = ["quality", "--model", str(tmp_path), "--dtype", "float32", "--threads", "1"]
    command += ["--text", str(tmp_path / "text"), "--stride", str(stride), "--block-size", "16"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code in (0, 1), result.output  # a random model does not care for sinks
    document = json.loads(result.stdout)
    anew, shift, plain = document["methods"]
    assert [each["name"] for each in document["methods"]] == [
        "anew",
        "shift, sinks 1",
        "shift, sinks 0",
    ]
    assert result.exit_code == (shift["above"] > 0.05)
    assert shift["perplexity"] != plain["perplexity"]

    token_ids = Tokenizer.from_directory(tmp_path).encode(text)
    attention = NaiveAttention(RotaryTable.for_model(CONFIG), CONFIG.num_heads)
    logprobs = []
    for begin, first, end in windows(len(token_ids), CONFIG.max_position, stride):
        hidden = model(torch.tensor(token_ids[begin : end - 1]), attention)
        rows = model.logits(hidden)[:, : CONFIG.vocab_size].log_softmax(-1)
        logprobs += [float(rows[at - begin - 1, token_ids[at]]) for at in range(first, end)]
    assert anew["tokens"] == shift["tokens"] == len(logprobs)
    assert anew["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-3)


def test_a_text_that_fits_says_nothing(tmp_path: Path) -> None:
    short_model(tmp_path)
    (tmp_path / "text").write_text("too short")
    command = ["quality", "--model", str(tmp_path), "--text", str(tmp_path / "text")]
    result = CliRunner().invoke(app, [*command, "--block-size", "16"])
    assert result.exit_code != 0
    assert "text must have more than 112 tokens" in str(result.exception)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "of 96 tokens has 1" in result.stderr
