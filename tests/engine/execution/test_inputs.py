"""Inputs that are changed in place are those that would be made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import core
from engine.config import SchedulerConfig
from engine.execution import inputs
from engine.execution.inputs import DecodeInputs, InputBatch, Inputs, StepInputs
from engine.messages import AddRequest, ScheduledRequest
from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.attention.cpu import KernelStep
from engine.model.attention.plain import TorchBackend
from engine.params import SamplingParams
from engine.scaling import RopeScaling
from tests.lives import Lives, drive, plain_engine


def metadata(made: StepInputs) -> AttentionMetadata:
    assert isinstance(made.attention, KernelStep)
    return made.attention._metadata


def assert_same(actual: StepInputs, expected: StepInputs) -> None:
    """In all that a kernel reads: the tables may be wider than they must."""
    assert torch.equal(actual.token_ids, expected.token_ids)
    assert torch.equal(actual.last, expected.last)
    got, wanted = metadata(actual), metadata(expected)
    for name in ("query_start", "positions", "slot_mapping", "num_blocks", "profiles"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    for row, count in enumerate(wanted.num_blocks.tolist()):
        for name in ("block_tables", "bases"):
            assert torch.equal(
                getattr(got, name)[row, :count], getattr(wanted, name)[row, :count]
            ), name


@dataclass
class Watched:
    """How often inputs were made for decoding, and how many steps they served."""

    made: int = 0
    steps: int = 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Every step's inputs are compared with those made anew."""
    count = Watched()
    in_place = Inputs.of

    class Counted(DecodeInputs):
        def __init__(self, rows: list[int], batch: InputBatch, backend: AttentionBackend) -> None:
            super().__init__(rows, batch, backend)
            count.made += 1

        def at(self, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
            count.steps += 1
            return super().at(scheduled)

    def compared(self: Inputs, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        given = in_place(self, scheduled)
        rows = np.array([self._batch.row(item.request) for item in scheduled])
        assert_same(given, self._gathered(scheduled, rows))
        return given

    monkeypatch.setattr(inputs, "DecodeInputs", Counted)
    monkeypatch.setattr(Inputs, "of", compared)
    return count


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_have_the_inputs_made_anew(
    tiny_model_dir: Path, watched: Watched, seed: int
) -> None:
    lives = Lives.drawn(seed)
    drive(plain_engine(tiny_model_dir, lives.pages, lives.config), lives.arrivals, lives.aborts)
    assert watched.steps > watched.made > 1


def test_a_row_may_go_to_another_rotation(tiny_model_dir: Path, watched: Watched) -> None:
    """The rows of a step are those of before, and the requests are not."""
    stretched = RopeScaling(type="linear", factor=2.0)
    one, other = (
        AddRequest(
            request_id=name,
            prompt_token_ids=[5],
            params=SamplingParams(rope=rope),
            seed=1,
            max_tokens=30,
            stop_token_ids=[],
        )
        for name, rope in (("one", None), ("other", stretched))
    )
    engine = plain_engine(tiny_model_dir, 60, SchedulerConfig(max_num_seqs=1))
    drive(engine, {0: [one], 40: [other]}, {})
    assert (watched.steps, watched.made) == (60, 1)


def test_torchs_attention_is_bound_anew_for_every_step(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "select_backend", TorchBackend)
    lives = Lives.drawn(0)

    def tokens() -> dict[str, list[int | None]]:
        engine = plain_engine(tiny_model_dir, lives.pages, lives.config)
        outputs = drive(engine, lives.arrivals, lives.aborts)
        return {name: [each.token_id for each in given] for name, given in outputs.items()}

    def gathered(self: Inputs, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        rows = np.array([self._batch.row(item.request) for item in scheduled])
        return self._gathered(scheduled, rows)

    given = tokens()
    monkeypatch.setattr(Inputs, "of", gathered)
    assert given == tokens()
