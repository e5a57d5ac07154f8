"""Drawing tokens on the CPU: the binding of the compiled kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.execution.uniforms import uniforms
from engine.model.library import load_kernel
from engine.request import Request

_DRAW = np.dtype(
    [
        ("uniform", np.float64),
        ("top_p", np.float64),
        ("temperature", np.float32),
        ("min_p", np.float32),
        ("row", np.int32),
        ("top_k", np.int32),
    ]
)
"""RopewayDraw of cpu_draw.cpp."""


class KernelDraw:
    """Draws rows by the compiled kernel, some on each thread. See draw.Draw."""

    def __init__(self, variant: str | None = None) -> None:
        """variant: an instruction set to insist on. Raises KernelUnavailableError."""
        argument_types = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_int32,
        ]
        self.variant, self._call = load_kernel("draw", argument_types, variant)

    def __call__(
        self, logits: Tensor, rows: Sequence[int], requests: Sequence[Request]
    ) -> list[int]:
        """Raises ValueError for logits not float32 and on the CPU, or for rows not in them."""
        if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.stride(1) != 1:
            raise ValueError(
                f"logits must be float32 rows on the CPU, got {logits.dtype} {logits.device}"
            )
        if not 0 <= min(rows) <= max(rows) < len(logits):
            raise ValueError(f"rows must be in [0, {len(logits)}), got {list(rows)}")
        draws = np.empty(len(rows), _DRAW)
        draws["uniform"] = uniforms(requests)
        params = [request.params for request in requests]
        for name in ("top_p", "temperature", "min_p", "top_k"):
            draws[name] = [getattr(each, name) for each in params]
        draws["row"] = rows
        token_ids = np.empty(len(rows), np.int64)
        if self._call(
            logits.data_ptr(),
            logits.stride(0),
            logits.shape[1],
            draws.ctypes.data,
            len(rows),
            token_ids.ctypes.data,
            torch.get_num_threads(),
        ):
            raise MemoryError("no memory for the scratch space of sampling")
        drawn: list[int] = token_ids.tolist()
        return drawn
