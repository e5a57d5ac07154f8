"""A loaded model made ready to serve on CUDA, without loading Triton anywhere else."""

from __future__ import annotations

from importlib import import_module

from engine.model.gpt2 import GPT2


def prepare_for_cuda(model: GPT2) -> str | None:
    """Replace products and norms by Triton's, whose rows do not depend on the batch, in place.

    Returns why not, where Triton is missing: it comes with PyTorch for CUDA on Linux only.
    """
    try:
        layers = import_module("engine.model.cuda_layers")
    except ImportError as error:
        return str(error)
    layers.use_triton(model)
    return None
