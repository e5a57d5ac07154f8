"""What every backend owes: the right numbers, and the same bits whatever stands beside a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.model.attention.base import AttentionMetadata
from engine.model.attention.reference import NaiveAttention
from engine.model.profiles import ProfileTables
from engine.model.rope import RotaryTable
from engine.scaling import UNSCALED, RopeScaling
from tests.engine.model.attention.steps import (
    Chunk,
    MakeBackend,
    Sequences,
    attention_config,
    make_backend,
)

__all__ = ["make_backend"]

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [  # num_heads, head_dim, rotary_dim, block_size
    (4, 64, 64, 64),
    (3, 32, 32, 16),
    (2, 80, 20, 32),
    (2, 96, 48, 64),
    (1, 48, 24, 32),
    (1, 128, 128, 64),
    (1, 20, 10, 16),
]
LENGTHS = [1, 17, 64, 65, 130, 31]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Unless a test says otherwise; the number of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float32: to 2e-6 of the largest; bfloat16: to one step of its mantissa."""
    if actual.dtype == torch.bfloat16:
        torch.testing.assert_close(actual, expected, rtol=2**-7, atol=1e-5)
    else:
        assert (actual - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(
    make_backend: MakeBackend, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    sequences = Sequences.random(attention_config(*shape[:3]), LENGTHS, shape[3], dtype)
    reference, backend = sequences.reference(), sequences.build(make_backend)
    expected = sequences.forward(reference, sequences.whole())
    assert_close(sequences.forward(backend, sequences.whole()), expected)
    assert torch.equal(backend.cache.keys[0], reference.cache.keys[0])
    assert torch.equal(backend.cache.values[0], reference.cache.values[0])


def test_agrees_with_absolute_rotation(make_backend: MakeBackend) -> None:
    sequences = Sequences.random(attention_config(2, 64, 32), [200, 70], 64, torch.float32)
    naive = NaiveAttention(RotaryTable.for_model(sequences.config), 2, torch.float64)
    expected = torch.cat([naive(0, rows) for rows in sequences.qkv])
    actual = sequences.forward(sequences.build(make_backend), sequences.whole())
    assert_close(actual, expected)


@st.composite
def plans(draw: st.DrawFn) -> list[list[Chunk]]:
    """Ways to cut sequences of LENGTHS into steps: any chunks, any order, any company."""
    done, steps = [0] * len(LENGTHS), []
    while done != LENGTHS:
        waiting = [seq for seq, length in enumerate(LENGTHS) if done[seq] < length]
        chosen = draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True))
        chunks = []
        for seq in chosen:
            size = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 16, 33, 64, 130]))
            end = min(LENGTHS[seq], done[seq] + size)
            chunks.append((seq, done[seq], end))
            done[seq] = end
        steps.append(chunks)
    return steps


@settings(
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    steps=plans(),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1000),
)
def test_cutting_changes_no_bit(
    make_backend: MakeBackend,
    steps: list[list[Chunk]],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    threads: int,
    seed: int,
) -> None:
    config = attention_config(*shape[:3])
    sequences = Sequences.random(config, LENGTHS, shape[3], dtype, seed)
    expected = sequences.forward(sequences.build(make_backend), sequences.whole())
    torch.set_num_threads(threads)
    backend = sequences.build(make_backend, stale=1e4)
    assert torch.equal(sequences.forward_in_steps(backend, steps), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_one_by_one_alone_or_together_changes_no_bit(
    make_backend: MakeBackend, dtype: torch.dtype
) -> None:
    lengths = [70] * 12
    sequences = Sequences.random(attention_config(4, 32, 32), lengths, 64, dtype)
    expected = sequences.forward(sequences.build(make_backend), sequences.whole())
    together = [[(seq, p, p + 1) for seq in range(12)] for p in range(70)]
    backend = sequences.build(make_backend)
    assert torch.equal(sequences.forward_in_steps(backend, together), expected)
    alone = sequences.build(make_backend)
    outputs = [sequences.forward(alone, [(5, p, p + 1)]) for p in range(70)]
    assert torch.equal(torch.cat(outputs), expected[5 * 70 : 6 * 70])


def test_the_place_of_pages_changes_no_bit(make_backend: MakeBackend) -> None:
    sequences = Sequences.random(attention_config(2, 64, 64), [150, 40], 64, torch.bfloat16)
    moved = replace(sequences, tables=([2, 5, 1], [4]))
    first, second = (
        case.forward(case.build(make_backend), case.whole()) for case in (sequences, moved)
    )
    assert torch.equal(first, second)


@pytest.mark.parametrize("shift", [64, 256])
def test_pages_do_not_know_their_position(make_backend: MakeBackend, shift: int) -> None:
    low = Sequences.random(attention_config(2, 64, 32), [150, 40], 64, torch.bfloat16)
    high = replace(low, shift=shift)
    caches, outputs = [], []
    for case in (low, high):
        backend = case.build(make_backend)
        outputs.append(case.forward(backend, case.whole()))
        caches.append(backend.cache)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    # A page written high is read low: moving it is changing an integer.
    backend = high.build(make_backend)
    high.forward(backend, [(0, 0, 149), (1, 0, 39)])
    last = low.forward(backend, [(0, 149, 150), (1, 39, 40)])
    assert torch.equal(last, torch.stack((outputs[0][149], outputs[0][189])))


def test_pages_may_have_gaps_between_them(make_backend: MakeBackend) -> None:
    """As after a shift that keeps the sinks; a page that lies wholly ahead is not seen."""
    sequences = Sequences.random(attention_config(2, 64, 32), [192], 64, torch.float32)
    results = []
    for backend in (sequences.build(make_backend), sequences.reference()):
        sequences.forward(backend, sequences.whole())
        chunk = sequences.metadata([(0, 184, 192)])
        gapped = AttentionMetadata(
            query_start=chunk.query_start,
            positions=chunk.positions + 70,
            slot_mapping=chunk.slot_mapping,
            block_tables=chunk.block_tables,
            bases=torch.tensor([[0, 97, 258]], dtype=torch.int32),
            num_blocks=chunk.num_blocks,
            profiles=chunk.profiles,
        )
        results.append(backend.forward(0, sequences.rows([(0, 184, 192)]), gapped))
    assert_close(*results)


SCALINGS = (
    UNSCALED,
    RopeScaling(type="xpos", factor=2),
    RopeScaling(type="yarn", factor=4),
    RopeScaling(type="ntk", factor=4),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [0, 1])
def test_profiles_in_one_step(make_backend: MakeBackend, layers: int, dtype: torch.dtype) -> None:
    """As the reference, and each sequence as if it were alone, to the bit."""
    config = replace(
        attention_config(2, 64, 32), learned_frequencies="per_layer" if layers else "none"
    )
    sequences = replace(
        Sequences.random(config, LENGTHS, 64, dtype),
        scalings=SCALINGS[: 2 if layers else 4],
        profiles=(1, 0, 1, 0, 1, 1) if layers else (1, 0, 2, 3, 2, 1),
        learned=torch.rand(1, 16, dtype=torch.float64) if layers else None,
    )
    reference, backend = sequences.reference(), sequences.build(make_backend)
    expected = sequences.forward(reference, sequences.whole())
    together = sequences.forward(backend, sequences.whole())
    assert_close(together, expected)
    assert torch.equal(backend.cache.keys[0], reference.cache.keys[0])
    alone = [sequences.forward(backend, [chunk]) for chunk in sequences.whole()]
    assert torch.equal(torch.cat(alone), together)


def test_tables_have_the_same_bits_however_they_grew() -> None:
    config = attention_config(1, 20, 10)
    grown, whole = (ProfileTables(config, 16, num_rows=2) for _ in range(2))
    for scaling in (SCALINGS[1], SCALINGS[2]):
        for extent in (1, 1025, 1500, 5000):
            grown.put(1, scaling, extent)
        whole.put(1, scaling, 5000)
        for one, other in (
            (grown.queries(1, 0), whole.queries(1, 0)),
            (grown.keys(1, 0), whole.keys(1, 0)),
        ):
            assert torch.equal(one.cos, other.cos)
            assert torch.equal(one.sin, other.sin)
    assert len(whole.queries(1, 0).cos) >= 5000


def test_scores_of_any_size_stay_finite(make_backend: MakeBackend) -> None:
    sequences = Sequences.random(attention_config(2, 32, 32), [100], 32, torch.float32)
    sequences.qkv[0][:, :128] *= 100.0
    actual = sequences.forward(sequences.build(make_backend), sequences.whole())
    expected = sequences.forward(sequences.reference(), sequences.whole())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-2)
