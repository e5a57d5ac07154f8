"""The Triton kernels under Triton's interpreter: numbers, bits, and that they compile for a GPU.

The interpreter takes a millisecond for a handful of operations, so the sequences are short.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from engine.errors import ConfigError
from engine.model.attention import triton as binding
from engine.model.attention.base import AttentionBackend, AttentionMetadata, KVCache
from engine.model.attention.reference import ReferenceBackend
from engine.model.attention.triton import Tile, TritonBackend
from engine.model.profiles import ProfileTables
from engine.scaling import UNSCALED, RopeScaling
from tests.engine.model.attention.steps import Chunk, Sequences, attention_config

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOLERANCE = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}
"""Of the largest output; products are of numbers rounded to the type."""

JOINED = partial(TritonBackend, num_processors=0)  # a program folds all pages
SPLIT = partial(TritonBackend, num_processors=10**6)  # a program for each page


@pytest.fixture(autouse=True)
def _read_two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "UNROLL", 2)


def built(sequences: Sequences, make: type | partial = JOINED, stale: float = 0.0):
    return sequences.build(make, stale, dimensions_last=True)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[actual.dtype] * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("num_heads", "head_dim", "rotary_dim", "block_size", "dtype", "make"),
    [
        (2, 64, 32, 64, F32, JOINED),
        (1, 80, 20, 16, BF16, SPLIT),
        (1, 96, 96, 32, F16, JOINED),
        (1, 32, 32, 16, F32, SPLIT),
        (1, 128, 6, 32, BF16, JOINED),
        (1, 256, 64, 16, BF16, JOINED),
    ],
)
def test_agrees_with_the_reference(
    num_heads: int,
    head_dim: int,
    rotary_dim: int,
    block_size: int,
    dtype: torch.dtype,
    make: partial[TritonBackend],
) -> None:
    config = attention_config(num_heads, head_dim, rotary_dim)
    sequences = Sequences.random(config, [2, 19], block_size, dtype)
    reference, backend = built(sequences, ReferenceBackend), built(sequences, make)
    chunks: list[Chunk] = [(1, 0, 17)]
    sequences.forward(reference, chunks)
    assert_close(sequences.forward(backend, chunks), sequences.forward(reference, chunks))
    chunks = [(1, 17, 19), (0, 0, 2)]
    assert_close(sequences.forward(backend, chunks), sequences.forward(reference, chunks))
    assert torch.equal(backend.cache.keys[0], reference.cache.keys[0])
    assert torch.equal(backend.cache.values[0], reference.cache.values[0])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cutting_changes_no_bit(dtype: torch.dtype) -> None:
    sequences = Sequences.random(attention_config(1, 32, 16), [1, 20, 6], 16, dtype)
    whole = built(sequences)
    expected = sequences.forward(whole, sequences.whole())
    steps: list[list[Chunk]] = [
        [(1, 0, 3)],
        [(0, 0, 1), (1, 3, 4), (2, 0, 5)],
        [(1, 4, 18), (2, 5, 6)],
        [(1, 18, 19)],
        [(1, 19, 20)],
    ]
    for make in (JOINED, SPLIT):
        cut = built(sequences, make, stale=1e4)
        assert torch.equal(sequences.forward_in_steps(cut, steps), expected)


def test_a_wide_tile_computes_the_same() -> None:
    sequences = Sequences.random(attention_config(1, 32, 32), [35, 3], 32, F32)
    wide = built(sequences, partial(JOINED, wide=Tile(32, 2, 2)))
    reference = built(sequences, ReferenceBackend)
    expected = sequences.forward(reference, sequences.whole())
    assert_close(sequences.forward(wide, sequences.whole()), expected)


def test_pages_may_have_gaps_between_them_and_lie_anywhere() -> None:
    sequences = Sequences.random(attention_config(1, 32, 32), [40], 16, F32)
    results = []
    for make in (ReferenceBackend, JOINED, SPLIT):
        backend = built(sequences, make)
        sequences.forward(backend, [(0, 0, 34)])
        chunk = sequences.metadata([(0, 34, 36)])
        gapped = replace(
            chunk,
            positions=chunk.positions + 70,
            bases=torch.tensor([[0, 50, 102]], dtype=torch.int32),
        )
        results.append(backend.forward(0, sequences.rows([(0, 34, 36)]), gapped))
    assert_close(results[1], results[0])
    assert torch.equal(results[1], results[2])


def test_sequences_may_have_profiles_of_their_own() -> None:
    """xPos among them, whose tables of queries and keys differ, and learned ones by layer."""
    sequences = replace(
        Sequences.random(attention_config(1, 32, 32), [18, 18, 3], 16, F32),
        scalings=(UNSCALED, RopeScaling(type="xpos"), RopeScaling(type="yarn", factor=4.0)),
        profiles=(2, 1, 0),
    )
    reference, backend = built(sequences, ReferenceBackend), built(sequences, SPLIT)
    expected = sequences.forward(reference, sequences.whole())
    assert_close(sequences.forward(backend, sequences.whole()), expected)
    assert torch.equal(backend.cache.keys[0], reference.cache.keys[0])


@pytest.mark.parametrize("make", [JOINED, SPLIT])
def test_absent_rows_touch_nothing(make: partial[TritonBackend]) -> None:
    """As a graph pads its batch: slot -1, no blocks."""
    sequences = Sequences.random(attention_config(1, 32, 32), [20], 16, BF16)
    backend = built(sequences, make)
    sequences.forward(backend, [(0, 0, 18)])
    present = sequences.metadata([(0, 18, 19)])
    expected = backend.forward(0, sequences.rows([(0, 18, 19)]), present)
    pages = backend.cache.keys[0].clone(), backend.cache.values[0].clone()

    def pad(tensor: torch.Tensor, value: int) -> torch.Tensor:
        return torch.cat((tensor, torch.full_like(tensor, value)))

    padded = AttentionMetadata(
        query_start=torch.tensor([0, 1, 2], dtype=torch.int32),
        positions=pad(present.positions, 0),
        slot_mapping=pad(present.slot_mapping, -1),
        block_tables=pad(present.block_tables, 0),
        bases=pad(present.bases, 0),
        num_blocks=pad(present.num_blocks, 0),
        profiles=pad(present.profiles, 0),
    )
    rows = sequences.rows([(0, 18, 19)]).repeat(2, 1)
    actual = backend.forward(0, rows, padded)
    assert torch.equal(actual[:1], expected)
    assert torch.equal(actual[1], torch.zeros_like(actual[1]))
    assert torch.equal(backend.cache.keys[0], pages[0])
    assert torch.equal(backend.cache.values[0], pages[1])


def test_heads_may_share_keys() -> None:
    """Grouped queries: two heads read one head's pages. The oracle repeats the pages."""
    config = attention_config(2, 32, 32)
    sequences = Sequences.random(config, [18], 16, F32)
    query, key, value = sequences.qkv[0].view(18, 3, 2, 32).unbind(1)
    repeated = torch.stack((query, *(each[:, :1].expand(-1, 2, -1) for each in (key, value))), 1)
    reference = built(sequences, ReferenceBackend)
    metadata = sequences.metadata(sequences.whole())
    expected = reference.forward(0, repeated.reshape(18, -1), metadata)
    pages = built(sequences).cache
    narrow = KVCache(
        tuple(each[:, :1] for each in pages.keys), tuple(each[:, :1] for each in pages.values)
    )
    grouped = JOINED(config, ProfileTables(config, 16), narrow)
    grouped.put_profile(0, UNSCALED, config.max_position)
    qkv = torch.cat((query.flatten(1), key[:, 0], value[:, 0]), dim=1)
    assert_close(grouped.forward(0, qkv, metadata), expected)


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "message"),
    [
        (32, 8, F32, "block_size must be one of"),
        (512, 16, F32, "head_dim must be at most 256"),
        (32, 16, torch.float64, "dtype must be one of float32, bfloat16, float16"),
    ],
)
def test_shapes_that_the_kernels_do_not_serve(
    head_dim: int, block_size: int, dtype: torch.dtype, message: str
) -> None:
    case = Sequences.random(attention_config(1, head_dim, 32), [3], block_size, dtype)
    with pytest.raises(ConfigError, match=message):
        built(case)


def test_wrong_tensors_are_refused() -> None:
    case = Sequences.random(attention_config(1, 32, 32), [3], 16, F32)
    backend: AttentionBackend = built(case)
    metadata = case.metadata(case.whole())
    for wrong in (case.qkv[0].double(), case.qkv[0][:, 1:], case.qkv[0].T.contiguous().T):
        with pytest.raises(ValueError, match="qkv must be"):
            backend.forward(0, wrong, metadata)
    with pytest.raises(ValueError, match="side by side"):
        case.build(JOINED).forward(0, case.qkv[0], metadata)
