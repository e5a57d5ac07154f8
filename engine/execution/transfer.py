"""Between host and device without waiting: one copy up for all that a step needs, one down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 64
"""Bytes at whose multiples arrays begin: kernels are compiled anew for addresses that are less
aligned."""


def upload(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Copies of the arrays on the device, in the order of its other work; on a CPU they share the
    arrays' memory where that is contiguous."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    return unpacked(packed(arrays, pin_memory=True).to(device, non_blocking=True), arrays)


def packed(arrays: Sequence[NDArray[np.generic]], *, pin_memory: bool) -> Tensor:
    """The bytes of the arrays, one behind the other, uint8.

    pin_memory: only such memory is copied without waiting for the device. PyTorch gives it to
    nobody else before the copies from it are done.
    """
    buffer = torch.empty(_places(arrays)[-1], dtype=torch.uint8, pin_memory=pin_memory)
    content = buffer.numpy()
    for array, place in zip(arrays, _places(arrays), strict=False):
        flat = np.ascontiguousarray(array).reshape(-1)
        content[place : place + array.nbytes] = flat.view(np.uint8)
    return buffer


def unpacked(buffer: Tensor, like: Sequence[NDArray[np.generic]]) -> list[Tensor]:
    """Views of a packed buffer with the types and shapes of the arrays it was made of."""
    return [
        buffer[place : place + array.nbytes]
        .view(torch.from_numpy(np.empty(0, array.dtype)).dtype)
        .view(array.shape)
        for array, place in zip(like, _places(like), strict=False)
    ]


def _places(arrays: Sequence[NDArray[np.generic]]) -> list[int]:
    """Where each array begins, and where the last one ends, in bytes."""
    places = [0]
    for array in arrays:
        places.append(places[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
    return places


@dataclass(frozen=True)
class Download:
    """A tensor on its way to the host."""

    _copy: Tensor
    _arrived: torch.cuda.Event | None

    @classmethod
    def start(cls, tensor: Tensor) -> Download:
        """Copy the tensor as the device's work up to now leaves it."""
        if not tensor.is_cuda:
            return cls(tensor.clone(), None)
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
        arrived.record()
        return cls(copy, arrived)

    def wait(self) -> Tensor:
        """The tensor on the host, once it is there; later work is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
