"""What goes to a device in one copy is what comes out of it."""

from __future__ import annotations

import numpy as np
import torch

from engine.execution.transfer import ALIGNMENT, Download, packed, unpacked, upload

ARRAYS = [
    np.arange(5, dtype=np.int64),
    np.zeros((0, 3), np.int32),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, 1:3],  # not contiguous
    np.array([0.5, -2.0], np.float64),
    np.array([1e-9], np.float32),
]


def test_packed_arrays_come_out_as_they_went_in() -> None:
    buffer = packed(ARRAYS, pin_memory=False)
    tensors = unpacked(buffer, ARRAYS)
    for array, tensor in zip(ARRAYS, tensors, strict=True):
        assert tensor.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(tensor.numpy(), array)
        assert (tensor.data_ptr() - buffer.data_ptr()) % ALIGNMENT == 0 or not tensor.numel()
    for array, tensor in zip(ARRAYS, upload(ARRAYS, torch.device("cpu")), strict=True):
        assert np.array_equal(tensor.numpy(), array)


def test_a_download_is_what_the_tensor_was() -> None:
    tensor = torch.arange(3)
    download = Download.start(tensor)
    tensor += 1
    assert download.wait().tolist() == [0, 1, 2]
