"""What is refused before it enters the engine, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ContextOverflow, InvalidRequest
from engine.frontend.admission import Admission, Usage
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, EngineReady
from engine.params import Overflow, RequestOptions, SamplingParams
from engine.request import Window
from tests.models import EOS


def admission(directory: Path, num_blocks: int = 100) -> Admission:
    ready = EngineReady(
        model="tiny",
        num_parameters=1,
        device="cpu",
        dtype="float32",
        attention="none",
        products="none",
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
        (
            "a\ud800",
            None,
            100,
            InvalidRequest,
            "prompt cannot be tokenised: .*surrogates not allowed",
        ),
        ([1, EOS + 1], None, 100, InvalidRequest, r"prompt\[1\] is 268; .* ids 0 to 267"),
        ([-1], None, 100, InvalidRequest, r"prompt\[0\] is -1"),
        ([1] * 193, None, 100, ContextOverflow, "193 tokens; the context takes 192"),
        (
            "a" * 10_000,
            None,
            100,
            ContextOverflow,
            "10000 characters; the context takes 192 tokens",
        ),
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


def test_truncate_keeps_the_end(tiny_model_dir: Path) -> None:
    options = RequestOptions(overflow="truncate")
    prompt = [at % 200 for at in range(1000)]
    request = admission(tiny_model_dir).admit("r", prompt, SamplingParams(max_tokens=50), options)
    assert request.prompt_token_ids == prompt[-143:]
    assert request.max_tokens == 50
    assert Usage.of(request, 50, 0) == Usage(143, 50, 0, 857)
    fits = admission(tiny_model_dir).admit("r", [1, 2], SamplingParams(), options)
    assert (fits.prompt_token_ids, fits.max_tokens, fits.truncated_tokens) == ([1, 2], 191, 0)
    small = admission(tiny_model_dir, num_blocks=5)
    assert (
        len(small.admit("r", prompt, SamplingParams(max_tokens=1), options).prompt_token_ids) == 80
    )


@pytest.mark.parametrize(
    ("overflow", "num_tokens", "max_tokens", "num_blocks", "error", "message"),
    [
        ("truncate", 193, None, 100, InvalidRequest, "max_tokens must be given .*193.* of 192"),
        ("truncate", 10, 193, 100, ContextOverflow, "at most 192 .*, got 193"),
        ("truncate", 192 * 64 + 1, 1, 100, ContextOverflow, "12289 tokens; .* takes 12288"),
        ("shift", 192 * 64 + 1, 1, 100, ContextOverflow, "12289 tokens; .* takes 12288"),
        ("shift", 192, 2, 11, ContextOverflow, "needs 12 pages of 16 .* has 12, the cache 11"),
    ],
)
def test_refused_although_it_may_overflow(
    tiny_model_dir: Path,
    overflow: Overflow,
    num_tokens: int,
    max_tokens: int | None,
    num_blocks: int,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        admission(tiny_model_dir, num_blocks).admit(
            "r",
            [1] * num_tokens,
            SamplingParams(max_tokens=max_tokens),
            RequestOptions(overflow=overflow),
        )


def test_shift_only_where_it_must(tiny_model_dir: Path) -> None:
    def admit(num_tokens: int, max_tokens: int | None) -> AddRequest:
        return admission(tiny_model_dir).admit(
            "r",
            [1] * num_tokens,
            SamplingParams(max_tokens=max_tokens),
            RequestOptions(overflow="shift"),
        )

    assert admit(100, 93).window is None
    endless = admit(100, None)
    assert (endless.window, endless.max_tokens) == (Window(16, 12), 2**31 - 1)
    long = admit(300, 1)
    assert long.window == Window(16, 12)
    assert len(long.prompt_token_ids) == 300
    assert Usage.of(long, 1, 0).dropped_tokens == 7 * 16  # of 19 pages, 12 are left


def test_what_a_token_sees_is_a_function_of_its_index() -> None:
    window = Window(4, 3)
    assert [window.num_dropped_blocks(at) for at in range(20)] == [0] * 12 + [1] * 4 + [2] * 4
    assert [window.chunk_end(at) for at in (0, 5, 11, 12, 15, 16)] == [12, 12, 12, 16, 16, 20]
