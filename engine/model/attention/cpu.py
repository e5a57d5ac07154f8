"""Paged attention on the CPU: the compiled kernel's binding, and plain torch where there is none.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180); online softmax: Milakov & Gimelshein 2018
(arXiv 1805.02867).
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.attention.base import Attention, AttentionBackend, AttentionMetadata, KVCache
from engine.model.rope import RotaryTable, rotate

LIBRARY = Path(__file__).with_name("_cpu_kernel.so")
VARIANTS = ("avx512", "avx2", "generic")
"""Instruction sets that the kernel is compiled for, best first."""

BLOCK_SIZES = (16, 32, 64)
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16)
OUT_OF_MEMORY = 2
"""The kernel's status when it finds no scratch space; 1 is a step outside cache or table."""

POWER_COEFFICIENTS = (
    0.00015353362,
    0.0013398875,
    0.00961843692,
    0.0555033237,
    0.240226477,
    0.693147182,
    1.0,
)
"""Minimax polynomial of 2^f over |f| <= 1/2 (2e-9 relative), highest power first."""


class KernelUnavailableError(Exception):
    """The compiled kernel cannot be used here; the message says why."""


class _Layer(ctypes.Structure):
    """RopewayLayer of cpu_kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "cos", "sin")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_blocks",
                "num_heads",
                "head_dim",
                "rotary_dim",
                "block_size",
                "num_positions",
                "is_bfloat16",
            )
        ),
        ("scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):
    """RopewayStep of cpu_kernel.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "query_start",
                "positions",
                "slot_mapping",
                "block_tables",
                "bases",
                "counts",
            )
        ),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_seqs", "max_blocks", "num_threads")),
    ]


@dataclass(frozen=True)
class Kernel:
    """One variant of the compiled kernel: attend(layer, step, qkv, out) -> status."""

    variant: str
    attend: Callable[..., int]


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library, bound to the OpenMP runtime that torch already uses.

    It is linked without one, so that its parallel regions run on torch's own threads: two pools
    on the same cores would fight.
    """
    if not LIBRARY.exists():
        raise KernelUnavailableError("no compiled kernel: installed without a C++ compiler")
    bundled = sorted(Path(torch.__file__).parent.glob("lib/lib*omp*.so*"))
    failures = []
    for runtime in [*map(str, bundled), "libgomp.so.1"]:
        try:
            ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(LIBRARY))
        except OSError as error:
            failures.append(str(error))
    raise KernelUnavailableError(f"{LIBRARY.name} does not load: {'; '.join(failures)}")


def supported_variants() -> tuple[str, ...]:
    """Variants that were compiled and that this machine can run, best first.

    Raises KernelUnavailableError when nothing was compiled, or it does not load.
    """
    library = load_library()
    names = [name for name in VARIANTS if hasattr(library, f"ropeway_supports_{name}")]
    return tuple(name for name in names if library[f"ropeway_supports_{name}"]())


def load_kernel(variant: str | None = None) -> Kernel:
    """The best variant for this machine, or the one asked for.

    Raises KernelUnavailableError, as supported_variants, or when the variant is not among them.
    """
    supported = supported_variants()
    chosen = variant or supported[0]
    if chosen not in supported:
        raise KernelUnavailableError(f"variant {chosen!r} is not among {', '.join(supported)}")
    attend = load_library()[f"ropeway_attention_{chosen}"]
    attend.argtypes = [ctypes.c_void_p] * 4
    attend.restype = ctypes.c_int
    return Kernel(chosen, attend)


class CPUBackend(AttentionBackend):
    """The compiled kernel. Runs on torch.get_num_threads() threads; their number changes no bit."""

    def __init__(
        self,
        config: ModelConfig,
        table: RotaryTable,
        cache: KVCache,
        variant: str | None = None,
    ) -> None:
        """variant: an instruction set to insist on, else the best that the machine has.

        Raises KernelUnavailableError where there is no such kernel, ConfigError for shapes that it
        does not serve (TorchBackend does).
        """
        super().__init__(config, table, cache)
        kernel = load_kernel(variant)
        self.name = f"cpu-{kernel.variant}"
        self.dtype = cache.keys[0].dtype
        self._check_shapes()
        self._attend = kernel.attend
        self._layers = [
            _Layer(
                keys.data_ptr(),
                values.data_ptr(),
                table.cos.data_ptr(),
                table.sin.data_ptr(),
                len(keys),
                config.num_heads,
                config.head_dim,
                config.rotary_dim,
                cache.block_size,
                len(table.cos),
                self.dtype == torch.bfloat16,
                _scale(config),
            )
            for keys, values in zip(cache.keys, cache.values, strict=True)
        ]
        self._addresses = [ctypes.addressof(layer) for layer in self._layers]

    def attend(self, layer: int, step: int, qkv: int, out: int) -> int:
        """Call the kernel with the addresses of a step and of two tensors; returns its status."""
        return self._attend(self._addresses[layer], step, qkv, out)

    def _check_shapes(self) -> None:
        """Raise ConfigError for what the kernel does not serve."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"the CPU kernel takes float32 and bfloat16, got {self.dtype}")
        if self.cache.block_size not in BLOCK_SIZES:
            raise ConfigError(
                f"block_size must be one of {BLOCK_SIZES} for the CPU kernel, "
                f"got {self.cache.block_size}"
            )
        if self.config.head_dim > MAX_HEAD_DIM:
            raise ConfigError(
                f"head_dim must be at most {MAX_HEAD_DIM} for the CPU kernel, "
                f"got {self.config.head_dim}"
            )
        half = self.config.rotary_dim // 2
        for name, table in (("cos", self.table.cos), ("sin", self.table.sin)):
            if table.dtype != torch.float32 or table.shape[1] != half or not table.is_contiguous():
                raise ConfigError(f"the table's {name} must be contiguous float32, {half} wide")

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward. Raises ValueError for metadata that leave the cache."""
        return self.bind(metadata)(layer, qkv)

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step: addresses are taken once, for all layers."""
        return _KernelStep(self, metadata)


class _KernelStep:
    """One step of the compiled kernel; keeps the metadata alive while it holds their addresses."""

    def __init__(self, backend: CPUBackend, metadata: AttentionMetadata) -> None:
        num_rows, (num_seqs, max_blocks) = len(metadata.positions), metadata.block_tables.shape
        tensors = {
            "query_start": (metadata.query_start, torch.int32, (num_seqs + 1,)),
            "positions": (metadata.positions, torch.int32, (num_rows,)),
            "slot_mapping": (metadata.slot_mapping, torch.int64, (num_rows,)),
            "block_tables": (metadata.block_tables, torch.int32, (num_seqs, max_blocks)),
            "bases": (metadata.bases, torch.int32, (num_seqs, max_blocks)),
            "num_blocks": (metadata.num_blocks, torch.int32, (num_seqs,)),
        }
        for name, (tensor, dtype, shape) in tensors.items():
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} {shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        addresses = (tensor.data_ptr() for tensor, _, _ in tensors.values())
        self._step = _Step(*addresses, num_rows, num_seqs, max_blocks, torch.get_num_threads())
        self._address = ctypes.addressof(self._step)
        self._metadata = metadata
        self._backend = backend
        self._in_shape = (num_rows, 3 * backend.config.hidden_size)
        self._out_shape = (num_rows, backend.config.hidden_size)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend = self._backend
        if qkv.dtype != backend.dtype or qkv.shape != self._in_shape or not qkv.is_contiguous():
            raise ValueError(
                f"qkv must be contiguous {backend.dtype} {self._in_shape}, "
                f"got {qkv.dtype} {tuple(qkv.shape)}"
            )
        out = qkv.new_empty(self._out_shape)
        status = backend.attend(layer, self._address, qkv.data_ptr(), out.data_ptr())
        if status == OUT_OF_MEMORY:
            raise MemoryError("no memory for the scratch space of attention")
        if status:
            raise ValueError("the metadata point outside the cache or the rotary table")
        return out


class TorchBackend(AttentionBackend):
    """The same contract in torch operations, for where nothing was compiled.

    Bits do not depend on the batch because every row is computed in the same place of the same
    shapes: rows stand in tiles of TILE_ROWS at t % TILE_ROWS, absent rows are zeros, and each tile
    meets each page in a product of fixed size. What is not a product is elementwise, made of
    operations that IEEE 754 defines to the last bit: torch's own exp and sum may differ between the
    middle and the ends of the pieces in which threads share a tensor.
    """

    TILE_ROWS = 8
    name = "torch"

    def __init__(self, config: ModelConfig, table: RotaryTable, cache: KVCache) -> None:
        super().__init__(config, table, cache)
        self.scale = _scale(config)

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward."""
        return self.bind(metadata)(layer, qkv)

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step: rows are sorted into tiles once, for all layers."""
        return _TorchStep(self, metadata)


class _TorchStep:
    """One step of TorchBackend: where rows stand in tiles, and which pages each tile meets."""

    def __init__(self, backend: TorchBackend, metadata: AttentionMetadata) -> None:
        self._backend = backend
        device, size = metadata.positions.device, backend.TILE_ROWS
        slots = metadata.slot_mapping
        self._block = slots // backend.cache.block_size
        self._offset = slots % backend.cache.block_size

        positions = metadata.positions.long()
        rows_of = metadata.query_start.diff().long()
        seq = torch.repeat_interleave(torch.arange(len(rows_of), device=device), rows_of)
        tiles, self._tile = torch.unique_consecutive(
            torch.stack((seq, positions // size)), dim=1, return_inverse=True
        )
        self._place = positions % size
        self._num_tiles = tiles.shape[1]
        tile_positions = tiles[1, :, None] * size + torch.arange(size, device=device)
        self._pages = []
        for page in range(int(metadata.num_blocks.max())):
            base = metadata.bases[tiles[0], page].long()
            meets = (page < metadata.num_blocks[tiles[0]]) & (base <= tile_positions[:, -1])
            live = meets.nonzero().squeeze(1)
            distance = tile_positions[live] - base[live, None]
            self._pages.append((live, metadata.block_tables[tiles[0][live], page].long(), distance))

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        backend = self._backend
        heads, dim = backend.config.num_heads, backend.config.head_dim
        query, key, value = qkv.view(-1, 3, heads, dim).unbind(1)
        cos, sin = backend.table.cos[self._offset, None], backend.table.sin[self._offset, None]
        keys, values = backend.cache.keys[layer], backend.cache.values[layer]
        keys[self._block, :, :, self._offset] = rotate(key, cos, sin)
        values[self._block, :, self._offset] = value

        shape = (self._num_tiles, heads, backend.TILE_ROWS)
        queries = query.new_zeros((*shape, dim), dtype=torch.float32)
        queries[self._tile, :, self._place] = query.float() * backend.scale
        out = torch.zeros_like(queries)
        total = queries.new_zeros((*shape, 1))
        best = queries.new_full((*shape, 1), -1e30)  # finite: absent rows see nothing at all
        for live, blocks, distance in self._pages:
            scores = self._scores(queries[live], keys[blocks], distance)
            highest = torch.maximum(best[live], scores.amax(-1, keepdim=True))
            decay = _power_of_two(best[live] - highest)
            weights = _power_of_two(scores - highest)
            out[live] = out[live] * decay + _product(weights, values[blocks].float())
            total[live] = total[live] * decay + _sum_last(weights)
            best[live] = highest
        rows = (out / total)[self._tile, :, self._place]
        return rows.to(qkv.dtype).reshape(-1, heads * dim)

    def _scores(self, queries: Tensor, keys: Tensor, distance: Tensor) -> Tensor:
        """Masked scores, float32 [tiles, num_heads, TILE_ROWS, block_size].

        queries float32 [tiles, num_heads, TILE_ROWS, head_dim]; keys [tiles, num_heads, head_dim,
        block_size]; distance int64 [tiles, TILE_ROWS], from the base of the tile's page to the row.
        """
        table = self._backend.table
        angle = distance.clamp(0, len(table.cos) - 1)  # only absent or masked rows are clamped
        turned = rotate(queries, table.cos[angle][:, None], table.sin[angle][:, None])
        slots = torch.arange(keys.shape[-1], device=keys.device)
        hidden = slots > distance[:, None, :, None]
        return _product(turned, keys.float()).masked_fill(hidden, float("-inf"))


def _scale(config: ModelConfig) -> float:
    """What a query is multiplied by, so that weights are powers of two of the scores."""
    return math.log2(math.e) / math.sqrt(config.head_dim)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product [n, heads, i, j] x [n, heads, j, k]; each of fixed shape."""
    flat_a, flat_b = a.flatten(0, 1), b.flatten(0, 1)
    if len(flat_a) == 1:  # a batch of one takes another way through the library: make it two
        flat = torch.bmm(flat_a.expand(2, -1, -1), flat_b.expand(2, -1, -1))[:1]
    else:
        flat = torch.bmm(flat_a, flat_b)
    return flat.view(*a.shape[:-1], b.shape[-1])


def _sum_last(x: Tensor) -> Tensor:
    """Sum over the last dimension (a power of two), by halves, keeping it."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x


def _power_of_two(x: Tensor) -> Tensor:
    """2^x for x <= 0, float32, to 2 ulp; exactly 1 at 0, exactly 0 below -125."""
    bounded = x.clamp(min=-126.0)
    whole = bounded.round()
    f = bounded - whole
    p = torch.full_like(f, POWER_COEFFICIENTS[0])
    for coefficient in POWER_COEFFICIENTS[1:]:
        p = p * f + coefficient
    exponent = (whole.to(torch.int32) + 127) << 23
    return torch.where(x >= -125.0, p * exponent.view(torch.float32), 0.0)


def select_backend(device: torch.device | str) -> type[AttentionBackend]:
    """The backend for a device; describe_backend says why it is this one."""
    return CPUBackend if _kernel_obstacle(device) is None else TorchBackend


def describe_backend(device: torch.device | str) -> str:
    """A line for people: "cpu-avx512", or "torch (why not the kernel)"."""
    obstacle = _kernel_obstacle(device)
    if obstacle is None:
        return f"cpu-{load_kernel().variant}"
    return f"{TorchBackend.name} ({obstacle})"


def _kernel_obstacle(device: torch.device | str) -> str | None:
    """Why the compiled kernel cannot serve a device, or None."""
    if torch.device(device).type != "cpu":
        return "the compiled kernel serves the CPU only"
    try:
        load_kernel()
    except KernelUnavailableError as obstacle:
        return str(obstacle)
    return None
