"""Paged attention on the CPU: the binding of the compiled kernel.

Paged attention: Kwon et al. 2023 (arXiv 2309.06180); online softmax: Milakov & Gimelshein 2018
(arXiv 1805.02867).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.model.attention.base import (
    Attention,
    AttentionBackend,
    AttentionMetadata,
    KVCache,
    check_shapes,
    score_scale,
)
from engine.model.library import address_of, load_kernel
from engine.model.profiles import ProfileTables
from engine.scaling import RopeScaling

DTYPES = (torch.float32, torch.bfloat16)
OUT_OF_MEMORY = 2
"""The kernel's status when it finds no scratch space; 1 is a step outside cache or table."""


class _Profile(ctypes.Structure):
    """RopewayProfile of cpu_kernel.cpp; zeros where nothing was put."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query_cos", "query_sin", "key_cos", "key_sin")),
        ("num_positions", ctypes.c_int32),
    ]


class _Layer(ctypes.Structure):
    """RopewayLayer of cpu_kernel.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "profiles")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_blocks",
                "num_heads",
                "head_dim",
                "rotary_dim",
                "block_size",
                "num_profiles",
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
                "profiles",
            )
        ),
        *((name, ctypes.c_int32) for name in ("num_rows", "num_seqs", "max_blocks", "num_threads")),
    ]


class CPUBackend(AttentionBackend):
    """The compiled kernel. Runs on torch.get_num_threads() threads; their number changes no bit."""

    reads_each_call = True

    def __init__(
        self,
        config: ModelConfig,
        profiles: ProfileTables,
        cache: KVCache,
        variant: str | None = None,
    ) -> None:
        """variant: an instruction set to insist on, else the best that the machine has.

        Raises KernelUnavailableError where there is no such kernel, ConfigError for shapes that it
        does not serve (TorchBackend does).
        """
        super().__init__(config, profiles, cache)
        chosen, self._attend = load_kernel("attention", [ctypes.c_void_p] * 4, variant)
        self.name = f"cpu-{chosen}"
        self.dtype = cache.keys[0].dtype
        check_shapes("the CPU kernel", config, cache, DTYPES)
        self._rows = [(_Profile * profiles.num_rows)() for _ in cache.keys]
        self._layers = [
            _Layer(
                keys=keys.data_ptr(),
                values=values.data_ptr(),
                profiles=ctypes.addressof(rows),
                num_blocks=len(keys),
                num_heads=config.num_heads,
                head_dim=config.head_dim,
                rotary_dim=config.rotary_dim,
                block_size=cache.block_size,
                num_profiles=profiles.num_rows,
                is_bfloat16=self.dtype == torch.bfloat16,
                scale=score_scale(config),
            )
            for keys, values, rows in zip(cache.keys, cache.values, self._rows, strict=True)
        ]
        self._addresses = (ctypes.c_void_p * len(self._layers))(
            *(ctypes.addressof(layer) for layer in self._layers)
        )
        self.layers_address = ctypes.addressof(self._addresses)
        self.function_address = address_of(self._attend)

    def attend(self, layer: int, step: int, qkv: int, out: int) -> int:
        """Call the kernel with the addresses of a step and of two tensors; returns its status."""
        return self._attend(self._addresses[layer], step, qkv, out)

    def put_profile(self, row: int, scaling: RopeScaling, num_positions: int) -> None:
        """See AttentionBackend.put_profile; the kernel is told where the tables lie."""
        super().put_profile(row, scaling, num_positions)
        for layer, rows in enumerate(self._rows):
            queries, keys = self.profiles.queries(row, layer), self.profiles.keys(row, layer)
            rows[row] = _Profile(
                queries.cos.data_ptr(),
                queries.sin.data_ptr(),
                keys.cos.data_ptr(),
                keys.sin.data_ptr(),
                len(queries.cos),
            )

    def forward(self, layer: int, qkv: Tensor, metadata: AttentionMetadata) -> Tensor:
        """See AttentionBackend.forward. Raises ValueError for metadata that leave the cache."""
        return self.bind(metadata)(layer, qkv)

    def bind(self, metadata: AttentionMetadata) -> Attention:
        """The attention of one step: addresses are taken once, for all layers."""
        return KernelStep(self, metadata)


class KernelStep:
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
            "profiles": (metadata.profiles, torch.int32, (num_seqs,)),
        }
        for name, (tensor, dtype, shape) in tensors.items():
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} {shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
        addresses = (tensor.data_ptr() for tensor, _, _ in tensors.values())
        self._step = _Step(*addresses, num_rows, num_seqs, max_blocks, torch.get_num_threads())
        self.address = ctypes.addressof(self._step)
        self.layers_address = backend.layers_address
        self.function_address = backend.function_address
        self.num_rows, self.dtype = num_rows, backend.dtype
        self._metadata = metadata
        self._backend = backend
        self._in_shape = (num_rows, 3 * backend.config.hidden_size)
        self._out_shape = (num_rows, backend.config.hidden_size)

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """See Attention."""
        backend = self._backend
        if qkv.dtype != backend.dtype or qkv.shape != self._in_shape or not qkv.is_contiguous():
            raise ValueError(
                f"qkv must be contiguous {backend.dtype} {self._in_shape}, "
                f"got {qkv.dtype} {tuple(qkv.shape)}"
            )
        out = qkv.new_empty(self._out_shape)
        self.check(backend.attend(layer, self.address, qkv.data_ptr(), out.data_ptr()))
        return out

    @staticmethod
    def check(status: int) -> None:
        """Raise what a kernel's status means: ValueError or MemoryError, nothing for 0."""
        if status == OUT_OF_MEMORY:
            raise MemoryError("no memory for the scratch space of a step")
        if status:
            raise ValueError("the metadata point outside the cache or the rotary tables")
