"""A loaded model made ready to serve on its device."""

from __future__ import annotations

from importlib import import_module

import torch

from engine.model.gpt2 import GPT2
from engine.model.linear import pack


def prepare(model: GPT2, device: torch.device) -> bool:
    """Replace the model's products (and norms) by those that serve on a device, in place.

    Returns whether a row's bits are then the same in any batch. They are not on CUDA without
    Triton: it comes with PyTorch for CUDA on Linux, and is not loaded anywhere else.
    """
    if device.type == "cpu":
        pack(model)
        return True
    try:
        layers = import_module("engine.model.cuda_layers")
    except ImportError:
        return False
    layers.use_triton(model)
    return True
