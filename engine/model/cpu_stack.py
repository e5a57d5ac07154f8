"""All blocks of a network in one call of the compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.model.attention.cpu import KernelStep
from engine.model.cpu_linear import KernelLinear
from engine.model.library import load_kernel


class _Block(ctypes.Structure):
    """RopewayBlock of cpu_stack.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("qkv", "out", "up", "down")]


class _Stack(ctypes.Structure):
    """RopewayStack of cpu_stack.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention", "linear", "blocks")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_blocks",
                "hidden_size",
                "intermediate_size",
                "element_size",
                "parallel",
            )
        ),
    ]


class KernelStack:
    """The products of several blocks, each (qkv, out, up, down), with attention between them."""

    def __init__(
        self,
        blocks: Sequence[tuple[KernelLinear, KernelLinear, KernelLinear, KernelLinear]],
        parallel: bool,
    ) -> None:
        """parallel: as ModelConfig.parallel_residual. At least one block."""
        _, self._call = load_kernel(
            "stack", [*[ctypes.c_void_p] * 5, ctypes.c_int32, ctypes.c_int32], "generic"
        )
        qkv, _, up, _ = blocks[0]
        self._products = blocks  # kept alive: the structures hold their addresses
        self._blocks = (_Block * len(blocks))(
            *(_Block(*(product.address for product in block)) for block in blocks)
        )
        self._stack = _Stack(
            None,  # of the step's backend
            qkv.function_address,
            ctypes.addressof(self._blocks),
            len(blocks),
            qkv.in_features,
            up.out_features,
            qkv.out_dtype.itemsize,
            parallel,
        )
        self._address = ctypes.addressof(self._stack)
        self.hidden_size = qkv.in_features
        self.dtype = qkv.out_dtype

    def __call__(self, x: Tensor, attention: KernelStep) -> Tensor:
        """float32 [num_rows, hidden_size] -> the same shape.

        Raises ValueError for another shape or type, and as KernelStep's call.
        """
        shape = (attention.num_rows, self.hidden_size)
        if x.dtype != torch.float32 or x.shape != shape or not x.is_contiguous():
            raise ValueError(
                f"x must be contiguous float32 {shape}, got {x.dtype} {tuple(x.shape)}"
            )
        if attention.dtype != self.dtype:
            raise ValueError(f"the cache holds {attention.dtype}, the products give {self.dtype}")
        self._stack.attention = attention.function_address
        out = torch.empty_like(x)
        status = self._call(
            self._address,
            attention.layers_address,
            attention.address,
            x.data_ptr(),
            out.data_ptr(),
            attention.num_rows,
            torch.get_num_threads(),
        )
        attention.check(status)
        return out
