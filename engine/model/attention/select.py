"""Which attention serves a model on this machine."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.attention.base import AttentionBackend, KVCache
from engine.model.attention.cpu import CPUBackend
from engine.model.attention.plain import TorchBackend
from engine.model.library import KernelUnavailableError
from engine.model.on_cuda import check_capability
from engine.model.profiles import ProfileTables


def select_backend(
    config: ModelConfig, profiles: ProfileTables, cache: KVCache
) -> AttentionBackend:
    """The fastest backend for the device and shape of a cache.

    Its name is a line for people: "cpu-avx512", or "torch (why not the kernel)".
    """
    obstacle = "the compiled kernel is for the CPU"
    device = cache.keys[0].device
    if device.type == "cuda" and (too_old := check_capability(device)):
        obstacle = too_old
    elif device.type == "cuda":
        try:
            # Triton is there where PyTorch was built for CUDA, and is not loaded elsewhere.
            module = import_module("engine.model.attention.triton")
            return cast(AttentionBackend, module.TritonBackend.probed(config, profiles, cache))
        except (ImportError, ConfigError) as error:
            obstacle = str(error)
    elif device.type == "cpu":
        try:
            return CPUBackend(config, profiles, cache)
        except (KernelUnavailableError, ConfigError) as error:
            obstacle = str(error)
    backend = TorchBackend(config, profiles, cache)
    backend.name = f"torch ({obstacle})"
    return backend
