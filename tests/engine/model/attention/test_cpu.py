"""The compiled kernel's binding, and the choice of a backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from engine.model.attention import cpu
from engine.model.attention.base import AttentionMetadata
from engine.model.library import KernelUnavailableError
from tests.engine.model.attention.steps import Sequences, attention_config


@pytest.fixture
def sequences() -> Sequences:
    return Sequences.random(attention_config(2, 32, 32), [40], 32, torch.float32)


@pytest.fixture
def kernel(sequences: Sequences) -> cpu.CPUBackend:
    backend = sequences.build(cpu.CPUBackend)
    assert isinstance(backend, cpu.CPUBackend)
    return backend


def test_an_unknown_variant_is_refused(kernel: cpu.CPUBackend) -> None:
    with pytest.raises(KernelUnavailableError, match="'mmx' is not among"):
        cpu.CPUBackend(kernel.config, kernel.profiles, kernel.cache, variant="mmx")


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype", "message"),
    [
        (32, 24, torch.float32, "block_size must be one of"),
        (512, 16, torch.float32, "head_dim must be at most"),
        (32, 16, torch.float16, "dtype must be one of float32, bfloat16"),
    ],
)
def test_shapes_that_the_kernel_does_not_serve(
    kernel: cpu.CPUBackend, head_dim: int, block_size: int, dtype: torch.dtype, message: str
) -> None:
    case = Sequences.random(attention_config(1, head_dim, 32), [3], block_size, dtype)
    with pytest.raises(ConfigError, match=message):
        case.build(cpu.CPUBackend)


def _with(metadata: AttentionMetadata, name: str, value: int) -> AttentionMetadata:
    return replace(metadata, **{name: getattr(metadata, name).clone().fill_(value)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("slot_mapping", -1),
        ("slot_mapping", 10**6),
        ("block_tables", -1),
        ("block_tables", 99),
        ("bases", -1000),
        ("positions", 5),
        ("num_blocks", 3),
        ("query_start", 41),
        ("profiles", -1),
        ("profiles", 1),
    ],
)
def test_addresses_outside_the_cache_are_refused(
    sequences: Sequences, kernel: cpu.CPUBackend, name: str, value: int
) -> None:
    metadata = _with(sequences.metadata(sequences.whole()), name, value)
    with pytest.raises(ValueError, match="outside the cache"):
        kernel.forward(0, sequences.qkv[0], metadata)


def test_tensors_of_the_wrong_kind_are_refused(
    sequences: Sequences, kernel: cpu.CPUBackend
) -> None:
    metadata = sequences.metadata(sequences.whole())
    rows = sequences.qkv[0]
    for wrong in (rows.double(), rows[:-1], rows.T.contiguous().T):
        with pytest.raises(ValueError, match="qkv must be"):
            kernel.forward(0, wrong, metadata)
    with pytest.raises(ValueError, match="positions must be"):
        kernel.forward(0, rows, replace(metadata, positions=metadata.positions.long()))
