"""Paged attention on CUDA: the binding of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from engine.config import ModelConfig
from engine.model.attention.base import (
    Attention,
    AttentionBackend,
    AttentionMetadata,
    KVCache,
    check_shapes,
    score_scale,
)
from engine.model.kernels import attention as kernels
from engine.model.kernels.common import emulates, next_power_of_2, padded
from engine.model.profiles import ProfileTables
from engine.scaling import UNSCALED, RopeScaling

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNROLL = 8
"""Pages whose partial results are read at once when they are joined."""

PROGRAMS_PER_PROCESSOR = 32
"""Programs for each multiprocessor at which splitting by pages gains nothing more."""


@dataclass(frozen=True)
class Tile:
    """rows of a sequence that one program computes, by so many warps, with so many stages of
    loads in flight."""

    rows: int
    num_warps: int
    num_stages: int


def narrow_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    """For steps of one row a sequence: the smallest that tensor cores take."""
    warps = 1 if head_dim <= 64 and dtype != torch.float32 else 4
    # Wide heads in float32 leave no room for a second page on its way.
    stages = 1 if head_dim * dtype.itemsize > 512 else 2
    return Tile(rows=16, num_warps=warps, num_stages=stages)


WIDE_TILES = (Tile(64, 4, 2), Tile(32, 2, 2))
"""For prompts, best first: used only where they give the bits of the narrow one."""


class TritonBackend(AttentionBackend):
    """The Triton kernels. A step's metadata may hold absent rows, as graphs need them: a sequence
    of one row with slot -1 and no blocks; its output is 0.

    Every sequence of a step has at least one row.
    """

    name = "triton"

    def __init__(
        self,
        config: ModelConfig,
        profiles: ProfileTables,
        cache: KVCache,
        *,
        wide: Tile | None = None,
        num_processors: int | None = None,
    ) -> None:
        """wide: the tile of steps with several rows a sequence; None: the narrow one, whose bits
        are those of decoding by construction (see `find_wide_tile`). num_processors: of the
        device; None: asked from CUDA. Raises ConfigError for shapes that the kernels do not serve.
        """
        super().__init__(config, profiles, cache)
        self.dtype = cache.keys[0].dtype
        check_shapes("the Triton kernels", config, cache, DTYPES)
        self.narrow = narrow_tile(config.head_dim, self.dtype)
        self.wide = wide or self.narrow
        self.out_dtype = self.dtype
        self._device = cache.keys[0].device
        if num_processors is None:
            num_processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self._enough_programs = max(1, PROGRAMS_PER_PROCESSOR * num_processors)
        # Addresses of cosines and sines of queries and of keys, by layer and profile.
        shape = (config.num_layers, profiles.num_rows, 4)
        self.tables = torch.zeros(shape, dtype=torch.int64, device=self._device)
        head_dim, half = config.head_dim, config.rotary_dim // 2
        self.num_kv_heads = cache.keys[0].shape[1]
        rest = head_dim - 2 * half
        self.shape = {
            "num_heads": config.num_heads,
            "head_dim": head_dim,
            "block_size": cache.block_size,
            "value_pad": padded(head_dim),
            "emulated": emulates(self.dtype),
        }
        self.rotation = {
            "num_kv_heads": self.num_kv_heads,
            "half": half,
            "half_pad": padded(half),
            "rest_pad": padded(rest) if rest else 0,
        }

    @classmethod
    def probed(cls, config: ModelConfig, profiles: ProfileTables, cache: KVCache) -> TritonBackend:
        """With the best of WIDE_TILES that gives the narrow tile's bits on this device."""
        return cls(config, profiles, cache, wide=find_wide_tile(config, cache))

    def put_profile(self, row: int, scaling: RopeScaling, num_positions: int) -> None:
        """See AttentionBackend.put_profile. Graphs that were captured before see it."""
        super().put_profile(row, scaling, num_positions)
        addresses = []
        for layer in range(self.config.num_layers):
            pair = self.profiles.queries(row, layer), self.profiles.keys(row, layer)
            addresses.append([each.data_ptr() for table in pair for each in (table.cos, table.sin)])
        self.tables[:, row] = torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward."""
        return self.bind(metadata)(layer, qkv)

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step: rows are sorted into tiles once, for all layers, on the
        device; nothing waits for it."""
        return _TritonStep(self, metadata)

    def pages_per_program(self, num_tiles: int, max_blocks: int) -> int:
        """How many pages a program takes, so that the device is full; changes no bit."""
        programs = num_tiles * self.config.num_heads
        return max(1, max_blocks * programs // self._enough_programs)


def find_wide_tile(config: ModelConfig, cache: KVCache) -> Tile | None:
    """The first of WIDE_TILES that gives the bits of the narrow tile, tried on random rows.

    Which hardware instruction multiplies depends on the tile, and no document says that two of them
    add in the same order.
    """
    size, device = cache.block_size, cache.keys[0].device
    dtype, num_blocks = cache.keys[0].dtype, 160 // size
    one_layer = replace(config, num_layers=1, learned_frequencies="none", rope=UNSCALED)
    profiles = ProfileTables(one_layer, size, device=device)
    num_rows = num_blocks * size
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn((num_rows, 3 * config.hidden_size), generator=generator, device=device)
    qkv = qkv.to(dtype)
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    blocks = torch.arange(num_blocks, dtype=torch.int32, device=device)[None]
    metadata = AttentionMetadata(
        query_start=rows.new_tensor([0, num_rows]),
        positions=rows,
        slot_mapping=rows.long(),
        block_tables=blocks,
        bases=blocks * size,
        num_blocks=rows.new_tensor([num_blocks]),
        profiles=rows.new_zeros(1),
    )

    def attended(wide: Tile | None) -> Tensor:
        pages = KVCache.allocate(one_layer, num_blocks, size, dtype, device, dimensions_last=True)
        backend = TritonBackend(one_layer, profiles, pages, wide=wide)
        backend.out_dtype = torch.float32  # rounding hides most differences, but not always
        backend.put_profile(0, UNSCALED, num_rows)
        return backend.forward(0, qkv, metadata)

    expected = attended(None)
    for tile in WIDE_TILES:
        try:
            if torch.equal(attended(tile), expected):
                return tile
        except OutOfResources:  # wide heads in float32 need more memory than a processor has
            continue
    return None


class _TritonStep:
    """One step of TritonBackend."""

    def __init__(self, backend: TritonBackend, metadata: AttentionMetadata) -> None:
        self._backend = backend
        self._metadata = metadata
        num_rows, (num_seqs, max_blocks) = len(metadata.positions), metadata.block_tables.shape
        device = metadata.positions.device
        self._num_seqs, self._max_blocks = num_seqs, max_blocks
        if num_rows == num_seqs:  # one row each
            self._tile = backend.narrow
            self._tile_seq = torch.arange(num_seqs, dtype=torch.int32, device=device)
            self._tile_start = self._row_seq = self._tile_seq
        else:
            self._tile = backend.wide
            self._sort(num_rows, num_seqs)
        self._pages = backend.pages_per_program(len(self._tile_seq), max_blocks)
        self._parts = -(-max_blocks // self._pages)

    def _sort(self, num_rows: int, num_seqs: int) -> None:
        """Rows into tiles: which sequence a tile belongs to, and where its sequence's begin."""
        metadata, size = self._metadata, self._tile.rows
        starts, positions = metadata.query_start, metadata.positions
        first, last = positions[starts[:-1]], positions[starts[1:] - 1]
        ends = (last // size - first // size + 1).cumsum(0, dtype=torch.int32)
        # At most 1 + ceil((rows - 1) / size) each; the number itself is on the device only.
        spare = num_rows - num_seqs
        most = num_seqs + (spare + (size - 1) * min(num_seqs, spare)) // size
        tiles = torch.arange(most, dtype=torch.int32, device=ends.device)
        rows = torch.arange(num_rows, dtype=torch.int32, device=ends.device)
        self._tile_seq = torch.searchsorted(ends, tiles, right=True, out_int32=True)
        self._tile_start = torch.nn.functional.pad(ends[:-1], (1, 0))
        self._row_seq = torch.searchsorted(starts[1:], rows, right=True, out_int32=True)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend, metadata = self._backend, self._metadata
        keys, values = backend.cache.keys[layer], backend.cache.values[layer]
        num_rows, heads, dim = len(qkv), backend.config.num_heads, backend.config.head_dim
        width = (heads + 2 * backend.num_kv_heads) * dim
        if qkv.dtype != backend.dtype or qkv.shape[1] != width or qkv.stride(1) != 1:
            raise ValueError(
                f"qkv must be {backend.dtype}, {width} wide and contiguous along it, "
                f"got {qkv.dtype} {tuple(qkv.shape)}"
            )
        places = _strides(keys, values)
        self._store(layer, qkv, keys, values, places)
        out = torch.empty(num_rows, heads * dim, dtype=backend.out_dtype, device=qkv.device)
        split = self._parts > 1
        rows = num_rows if split else 0
        parts = rows * heads * self._max_blocks
        part_out = torch.empty(parts * dim, dtype=torch.float32, device=qkv.device)
        part_best = torch.empty(parts, dtype=torch.float32, device=qkv.device)
        part_total = torch.empty_like(part_best)
        kernels.attend[(len(self._tile_seq), heads, self._parts)](
            qkv,
            out,
            part_out,
            part_best,
            part_total,
            keys,
            values,
            backend.tables[layer],
            metadata.profiles,
            self._tile_seq,
            self._tile_start,
            metadata.query_start,
            metadata.positions,
            metadata.block_tables,
            metadata.bases,
            metadata.num_blocks,
            self._num_seqs,
            self._max_blocks,
            qkv.stride(0),
            out.stride(0),
            *places,
            score_scale(backend.config),
            self._pages,
            **backend.shape,
            **backend.rotation,
            tile_rows=self._tile.rows,
            split=split,
            num_warps=self._tile.num_warps,
            num_stages=self._tile.num_stages,
            enable_fp_fusion=False,
        )
        if split:
            kernels.combine[(num_rows, heads)](
                out,
                part_out,
                part_best,
                part_total,
                self._row_seq,
                metadata.positions,
                metadata.bases,
                metadata.num_blocks,
                self._max_blocks,
                out.stride(0),
                **backend.shape,
                unroll=UNROLL,
                num_warps=1,
                enable_fp_fusion=False,
            )
        return out

    def _store(
        self, layer: int, qkv: Tensor, keys: Tensor, values: Tensor, places: tuple[int, ...]
    ) -> None:
        backend = self._backend
        head_tile = min(16, next_power_of_2(backend.num_kv_heads))
        kernels.store[(len(qkv), -(-backend.num_kv_heads // head_tile))](
            qkv,
            keys,
            values,
            backend.tables[layer],
            self._metadata.profiles,
            self._row_seq,
            self._metadata.slot_mapping,
            qkv.stride(0),
            *places,
            **backend.shape,
            **backend.rotation,
            head_tile=head_tile,
            num_warps=4,
            enable_fp_fusion=False,
        )


def _strides(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """Steps between blocks, heads and slots of the two; between dimensions it is 1."""
    if keys.stride(2) != 1 or values.stride(3) != 1:
        raise ValueError("the cache's dimensions of a slot must lie side by side")
    return keys.stride(0), keys.stride(1), keys.stride(3), *values.stride()[:3]
