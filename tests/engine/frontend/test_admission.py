"""What is refused before it enters the engine, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ContextOverflow, InvalidRequest
from engine.frontend.admission import Admission
from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineReady
from engine.request import SamplingParams
from tests.models import EOS


def admission(directory: Path, num_blocks: int = 100) -> Admission:
    ready = EngineReady(
        model="tiny",
        num_parameters=1,
        device="cpu",
        dtype="float32",
        attention="none",
        num_blocks=num_blocks,
        block_size=16,
        kv_bytes=1,
        max_position=192,
        eos_token_id=EOS,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        threads=1,
    )
    return Admission(Tokenizer.from_directory(directory), ready)


def test_defaults_are_settled(tiny_model_dir: Path) -> None:
    request = admission(tiny_model_dir).admit("r", [1, 2], SamplingParams())
    assert request.max_tokens == 191
    assert request.stop_token_ids == [EOS]
    seeds = {admission(tiny_model_dir).admit("r", [1], SamplingParams()).seed for _ in range(9)}
    assert len(seeds) == 9


def test_ignore_eos_and_seed(tiny_model_dir: Path) -> None:
    params = SamplingParams(ignore_eos=True, stop_token_ids=(9,), seed=0, max_tokens=3)
    request = admission(tiny_model_dir).admit("r", "the", params)
    assert request.stop_token_ids == [9]
    assert request.seed == 0
    assert request.max_tokens == 3


def test_prompt_as_long_as_the_context_gives_one_token(tiny_model_dir: Path) -> None:
    assert admission(tiny_model_dir).admit("r", [1] * 192, SamplingParams()).max_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "num_blocks", "error", "message"),
    [
        ("", None, 100, InvalidRequest, "at least one token, got none"),
        ([], None, 100, InvalidRequest, "at least one token, got none"),
        ("a\ud800", None, 100, InvalidRequest, "cannot be tokenised"),
        ([1, EOS + 1], None, 100, InvalidRequest, r"prompt\[1\] is 268; .* ids 0 to 267"),
        ([-1], None, 100, InvalidRequest, r"prompt\[0\] is -1"),
        ([1] * 193, None, 100, ContextOverflow, "193 tokens; the context is 192"),
        ("a" * 10_000, None, 100, ContextOverflow, "10000 characters; the context of 192"),
        ([1] * 100, 94, 100, ContextOverflow, "context of 192 tokens; .* can be at most 93"),
        ([1] * 100, None, 5, ContextOverflow, "cache of 80 tokens; max_tokens can be at most 0"),
        ([1] * 10, 100, 5, ContextOverflow, "cache of 80 tokens; max_tokens can be at most 71"),
    ],
)
def test_refused(
    tiny_model_dir: Path,
    prompt: str | list[int],
    max_tokens: int | None,
    num_blocks: int,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        admission(tiny_model_dir, num_blocks).admit(
            "r", prompt, SamplingParams(max_tokens=max_tokens)
        )
