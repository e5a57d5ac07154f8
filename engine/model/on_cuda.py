"""A loaded model made ready to serve on CUDA, without loading Triton anywhere else."""

from __future__ import annotations

from importlib import import_module

import torch

from engine.model.gpt2 import GPT2

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which on tensor cores take bfloat16."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a CUDA device multiplies bfloat16."""
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def check_capability(device: torch.device) -> str | None:
    """Why the Triton kernels do not serve a CUDA device; None where they do."""
    found = torch.cuda.get_device_capability(device)
    if found >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, each)) for each in (LEAST_CAPABILITY, found))
    return f"the Triton kernels need compute capability {least}, this device has {has}"


def prepare_for_cuda(model: GPT2) -> str | None:
    """Replace products and norms by Triton's, whose rows do not depend on the batch, in place.

    Returns why not, where the device is too old, or where Triton is missing: it comes with PyTorch
    for CUDA on Linux only.
    """
    if obstacle := check_capability(model.embedding.weight.device):
        return obstacle
    try:
        layers = import_module("engine.model.cuda_layers")
    except ImportError as error:
        return str(error)
    layers.use_triton(model)
    return None
