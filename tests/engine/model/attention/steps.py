"""Sequences, their pages and the metadata of steps over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.attention.base import AttentionBackend, AttentionMetadata, KVCache
from engine.model.attention.cpu import CPUBackend
from engine.model.attention.plain import TorchBackend
from engine.model.attention.reference import ReferenceBackend
from engine.model.library import supported_variants
from engine.model.profiles import ProfileTables
from engine.scaling import UNSCALED, RopeScaling

MakeBackend = Callable[[ModelConfig, ProfileTables, KVCache], AttentionBackend]
Chunk = tuple[int, int, int]
"""A sequence and its positions first .. end - 1."""

BACKENDS = ("avx512", "avx2", "generic", "torch")


@pytest.fixture(params=BACKENDS)
def make_backend(request: pytest.FixtureRequest) -> MakeBackend:
    """Every backend that this machine can run."""
    if request.param == "torch":
        return TorchBackend
    if request.param not in supported_variants(
        "attention"
    ):  # nothing compiled: an error, not a skip
        pytest.skip(f"this machine has no {request.param}")
    return lambda config, tables, cache: CPUBackend(config, tables, cache, variant=request.param)


def attention_config(num_heads: int, head_dim: int, rotary_dim: int) -> ModelConfig:
    """One layer with a context of 512."""
    return ModelConfig(
        vocab_size=8,
        padded_vocab_size=8,
        num_layers=1,
        num_heads=num_heads,
        hidden_size=num_heads * head_dim,
        intermediate_size=8,
        max_position=512,
        rotary_dim=rotary_dim,
    )


@dataclass(frozen=True)
class Sequences:
    """Random queries, keys and values of some sequences, and where their pages lie."""

    config: ModelConfig
    block_size: int
    qkv: tuple[Tensor, ...]
    tables: tuple[list[int], ...]
    shift: int = 0  # what is added to every base and position
    scalings: tuple[RopeScaling, ...] = (UNSCALED,)  # by row of the profiles
    profiles: tuple[int, ...] = ()  # by sequence; none: all have row 0
    learned: Tensor | None = None

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        lengths: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> Sequences:
        """Normal values; pages in random places, with one page to spare at either end."""
        generator = torch.Generator().manual_seed(seed)
        width = 3 * config.hidden_size
        qkv = tuple(torch.randn(n, width, generator=generator).to(dtype) for n in lengths)
        counts = [-(-n // block_size) for n in lengths]
        ids = torch.randperm(sum(counts), generator=generator) + 1
        tables = tuple(part.tolist() for part in ids.split(counts))
        return cls(config, block_size, qkv, tables)

    @property
    def num_blocks(self) -> int:
        return sum(map(len, self.tables)) + 2

    def build(
        self, make: MakeBackend, stale: float = 0.0, dimensions_last: bool = False
    ) -> AttentionBackend:
        """A backend over a cache filled with a value."""
        cache = KVCache.allocate(
            self.config,
            self.num_blocks,
            self.block_size,
            self.qkv[0].dtype,
            dimensions_last=dimensions_last,
        )
        for pages in (*cache.keys, *cache.values):
            pages.fill_(stale)
        tables = ProfileTables(
            self.config, self.block_size, num_rows=len(self.scalings), learned=self.learned
        )
        backend = make(self.config, tables, cache)
        for row, scaling in enumerate(self.scalings):
            backend.put_profile(row, scaling, self.config.max_position)
        return backend

    def reference(self) -> AttentionBackend:
        return self.build(ReferenceBackend)

    def rows(self, chunks: Sequence[Chunk]) -> Tensor:
        """The rows of a step."""
        return torch.cat([self.qkv[seq][first:end] for seq, first, end in chunks])

    def metadata(self, chunks: Sequence[Chunk]) -> AttentionMetadata:
        """Where the rows of a step stand."""
        size = self.block_size
        widest = max(map(len, self.tables))
        tables = torch.zeros(len(chunks), widest, dtype=torch.int32)
        bases = torch.zeros_like(tables)
        starts, positions, slots, counts = [0], [], [], []
        for row, (seq, first, end) in enumerate(chunks):
            count = -(-end // size)
            tables[row, :count] = torch.tensor(self.tables[seq][:count])
            bases[row, :count] = torch.arange(count) * size + self.shift
            starts.append(starts[-1] + end - first)
            positions += [p + self.shift for p in range(first, end)]
            slots += [self.tables[seq][p // size] * size + p % size for p in range(first, end)]
            counts.append(count)
        return AttentionMetadata(
            query_start=torch.tensor(starts, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            block_tables=tables,
            bases=bases,
            num_blocks=torch.tensor(counts, dtype=torch.int32),
            profiles=torch.tensor(
                [self.profiles[seq] if self.profiles else 0 for seq, _, _ in chunks],
                dtype=torch.int32,
            ),
        )

    def whole(self) -> list[Chunk]:
        """All rows of all sequences in one step."""
        return [(seq, 0, len(rows)) for seq, rows in enumerate(self.qkv)]

    def forward(self, backend: AttentionBackend, chunks: Sequence[Chunk]) -> Tensor:
        return backend.forward(0, self.rows(chunks), self.metadata(chunks))

    def forward_in_steps(
        self, backend: AttentionBackend, steps: Sequence[Sequence[Chunk]]
    ) -> Tensor:
        """Outputs in the order of `whole`, however they were cut."""
        width = self.config.hidden_size
        out = [torch.empty(len(rows), width, dtype=rows.dtype) for rows in self.qkv]
        for chunks in steps:
            sizes = [end - first for _, first, end in chunks]
            parts = self.forward(backend, chunks).split(sizes)
            for (seq, first, end), part in zip(chunks, parts, strict=True):
                out[seq][first:end] = part
        return torch.cat(out)
