"""Graphs without a GPU: a recorder that calls the work again, and steps that can be foretold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from engine.execution.cuda_graphs import NOT_RUN, DecodeGraphs, DecodeState, DecodeStep
from engine.execution.device_sampler import WIDTH, DeviceSampler
from engine.execution.kernels import step as step_kernels
from engine.execution.sampling_tensors import SamplingTensors
from engine.model.attention.base import KVCache
from engine.model.attention.reference import NaiveAttention
from engine.model.attention.triton import TritonBackend
from engine.model.cuda_layers import use_triton
from engine.model.profiles import ProfileTables
from engine.model.rope import RotaryTable
from engine.scaling import UNSCALED
from tests.models import random_model, tiny_config

SIZE = 16


class Recorder:
    """Remembers what was recorded; a replay does the work again."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return work

    def free_memory(self) -> int:
        return 100 - 7 * self.recorded


class Counting:
    """A step that writes down how many rows it was asked for and who was there."""

    def __init__(self, state: DecodeState) -> None:
        self.state = state
        self.calls: list[tuple[int, list[int]]] = []

    def __call__(self, num_rows: int) -> None:
        present = self.state.num_blocks[:num_rows] > 0
        self.calls.append((num_rows, present.nonzero()[:, 0].tolist()))
        self.state.sampled[:num_rows, 0] = torch.where(present, self.state.positions[:num_rows], -2)
        self.state.positions[:num_rows] += present


def int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def test_buckets_are_recorded_once_when_first_needed_and_change_nothing() -> None:
    state, recorder = DecodeState(12, 3, SIZE, 30, "cpu"), Recorder()
    step = Counting(state)
    graphs = DecodeGraphs(step, state, recorder)
    assert graphs.buckets == [1, 2, 4, 8, 12]
    assert [graphs.bucket(n) for n in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    with pytest.raises(IndexError):
        graphs.bucket(13)
    state.put([0, 2], {"num_blocks": int32(1, 1), "positions": int32(5, 9)})
    graphs.launch(3)
    assert step.calls == [(4, []), (4, [0, 2])]  # for what it compiles; then the step
    assert state.positions[:3].tolist() == [6, 0, 10]
    graphs.launch(4)
    assert step.calls[2:] == [(4, [0, 2])]
    assert recorder.recorded == 1
    graphs.launch(1)
    assert step.calls[3:] == [(1, []), (1, [0])]
    assert recorder.recorded == graphs.num_recorded == 2
    assert graphs.memory == 14


def test_graphs_are_recorded_ahead_for_so_long_and_one_in_any_case() -> None:
    state = DecodeState(12, 3, SIZE, 30, "cpu")
    graphs = DecodeGraphs(Counting(state), state, Recorder())
    graphs.record_ahead(0.0)
    assert graphs.num_recorded == 1
    times = iter(range(100))
    graphs.record_ahead(3.0, lambda: float(next(times)))  # looked at after each
    assert graphs.num_recorded == 3
    graphs.record_ahead(60.0)
    assert graphs.num_recorded == len(graphs.buckets) == 5


def test_rows_are_taken_from_below_and_leave_nobody_behind() -> None:
    state = DecodeState(3, 2, SIZE, 30, "cpu")
    assert [state.take() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(IndexError):
        state.take()
    state.put([0, 1, 2], {"num_blocks": int32(1, 1, 1)})
    state.release([2, 0])
    assert state.num_blocks.tolist() == [0, 1, 0]
    assert [state.take(), state.take()] == [0, 2]
    state.release([])


def test_a_row_is_written_in_place() -> None:
    state = DecodeState(4, 5, SIZE, 30, "cpu")
    addresses = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
    at = state.put(
        [3, 1],
        {
            "token_ids": np.array([7, 8]),
            "top_p": np.array([0.5, 0.25]),
            "seed": np.array([-1, 2]),
        },
    )
    assert at.tolist() == [3, 1]
    state.put_tables([3, 1], [[4, 5], [6]])
    assert state.token_ids.tolist() == [0, 8, 0, 7]
    assert state.block_tables[3].tolist() == [4, 5, 0, 0, 0]
    assert state.num_blocks.tolist() == [0, 1, 0, 2]
    assert state.bases[2].tolist() == [0, 16, 32, 48, 64]
    assert state.sampling.top_p.tolist() == [1.0, 0.25, 1.0, 0.5]
    assert state.sampling.seed.tolist() == [0, 2, 0, -1]
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == addresses


def test_a_whole_step_decodes_what_a_full_recompute_does() -> None:
    """The kernels, the sampler and the state together; greedy, in float32, against no cache."""
    config = tiny_config(num_layers=1)
    model = random_model(config)
    naive = NaiveAttention(RotaryTable.for_model(config), config.num_heads)
    known = [3, 30]
    with torch.inference_mode():
        expected = list(known)
        for _ in range(2):
            logits = model.logits(model(torch.tensor(expected), naive))[-1, : config.vocab_size]
            expected.append(int(logits.argmax()))
        use_triton(model, wide=())
        cache = KVCache.allocate(config, 4, SIZE, torch.float32, dimensions_last=True)
        tables = ProfileTables(config, SIZE)
        backend = TritonBackend(config, tables, cache, num_processors=0)
        backend.put_profile(0, UNSCALED, config.max_position)
        state = DecodeState(3, 2, SIZE, config.vocab_size, "cpu")
        sampler = DeviceSampler(config.vocab_size, device="cpu")
        graphs = DecodeGraphs(DecodeStep(model, backend, sampler, state), state, Recorder(), (3,))
        # Row 1 feeds its prompt a token at a time; row 0 is absent, row 2 is out of pages.
        state.put([1, 2], {"num_blocks": int32(1, 1), "positions": int32(0, SIZE)})
        state.put([1], {"block_tables": int32(2)[:, None]})
        state.put([2], {"token_ids": np.array([9])})
        tokens = list(known)
        for at in range(len(expected) - 1):
            state.put([1], {"token_ids": np.array([tokens[at]])})
            graphs.launch(3)
            first, token, last = state.sampled[:, 0].tolist()
            assert (first, last) == (NOT_RUN, NOT_RUN)
            if at >= len(known) - 1:
                tokens.append(token)
    assert tokens == expected
    assert state.positions.tolist() == [0, len(expected) - 1, SIZE]
    assert state.sampling.index.tolist() == [0, len(expected) - 1, 0]
    assert state.token_ids.tolist() == [0, expected[-1], 9]
    assert not cache.keys[0][[0, 1, 3]].any()


HELD = (
    "empty empty_like empty_strided arange embedding slice select view reshape unbind flatten stack"
)
"""What of torch a graph may hold beside Triton's kernels: nothing that needs the host."""

INTERPRETERS_OWN = "set_ new_empty copy_"


class Calls(TorchDispatchMode):
    """Writes down which operations of torch are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,  # torch's own
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        self.names.add(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("qk_norm", ["none", "before"])
def test_a_step_calls_nothing_that_a_graph_cannot_hold(qk_norm: str) -> None:
    config = tiny_config(num_layers=1, qk_norm=qk_norm)
    model = random_model(config)
    with torch.inference_mode():
        use_triton(model, wide=())
        cache = KVCache.allocate(config, 4, SIZE, torch.float32, dimensions_last=True)
        tables = ProfileTables(config, SIZE)
        backend = TritonBackend(config, tables, cache, num_processors=10**6)  # split by pages
        backend.put_profile(0, UNSCALED, config.max_position)
        state = DecodeState(3, 2, SIZE, config.vocab_size, "cpu")
        state.put([1], {"num_blocks": int32(1)})
        step = DecodeStep(model, backend, DeviceSampler(config.vocab_size, device="cpu"), state)
        with Calls() as calls:
            step(3)
    assert calls.names - set(INTERPRETERS_OWN.split()) <= set(HELD.split())
    assert "embedding" in calls.names


def test_a_step_counts_the_tokens_of_rows_with_penalties() -> None:
    """Of those that are present and got one; the others' counts are left as they are."""
    sampling = SamplingTensors.vacant(5, 7, "cpu")
    sampling.penalties[[0, 1, 2]] = torch.tensor([1.0, 0.5, 0.0])
    sampling.penalties[4] = torch.tensor([1.0, 0.0, -0.5])
    sampling.present.copy_(torch.tensor([2, 0, 1, 1, 1]))  # 1: absent, 3: no penalty
    sampling.counts[0, 6] = 3
    before = sampling.counts.clone()
    token_ids, positions = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    for tokens in ((6, 4, -1, 5, 2), (0, 4, 3, 5, 2)):
        sampled = torch.tensor(tokens, dtype=torch.int32)[:, None].repeat(1, WIDTH)
        step_kernels.advance[(5,)](
            sampling.present,
            sampled,
            token_ids,
            positions,
            sampling.index,
            sampling.penalties,
            sampling.counts,
            WIDTH,
            counts_width=sampling.counts.shape[1],
            not_run=NOT_RUN,
            num_warps=1,
        )
        assert sampled[:, 0].tolist() == [tokens[0], NOT_RUN, *tokens[2:]]
        assert (sampled[:, 1:] == sampled.new_tensor(tokens)[:, None]).all()
    gained = (sampling.counts - before).nonzero().tolist()
    assert gained == [[0, 0], [0, 6], [2, 3], [4, 2]]
    assert sampling.counts[0, [0, 6]].tolist() == [2, 5]
    assert sampling.counts[4, 2] == 4
    assert sampling.index.tolist() == positions.tolist() == [2, 0, 2, 2, 2]
    assert token_ids.tolist() == [0, 0, 3, 5, 2]
