"""What an engine takes of its machine: a device, a type of numbers, memory for pages."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

from engine.config import CacheConfig, DType, ModelConfig, SchedulerConfig
from engine.errors import ConfigError
from engine.model.attention.base import KVCache
from engine.model.on_cuda import has_bfloat16


def resolve_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but PyTorch finds no CUDA device; use cpu or auto")
    return torch.device(device)


def resolve_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32."""
    if dtype == "auto":
        on_cuda = device.type == "cuda"
        native = has_bfloat16(device) if on_cuda else torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the machine can give, and its container too where there is one."""
    free: int = psutil.virtual_memory().available
    try:
        limit, used = (
            (cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current")
        )
    except OSError:  # no container with a limit of its own
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))


def num_cache_blocks(
    model: ModelConfig,
    cache: CacheConfig,
    scheduler: SchedulerConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Pages that the memory budget holds. Raises ConfigError where it does not hold one."""
    size = KVCache.bytes_per_block(model, cache.block_size, dtype)
    if cache.kv_memory is not None:
        if cache.kv_memory < size:
            raise ConfigError(
                f"kv_memory must hold at least one page of {cache.block_size} tokens "
                f"({size} bytes), got {cache.kv_memory}"
            )
        return cache.kv_memory // size
    per_sequence = -(-model.rope.context(model.max_position) // cache.block_size)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = available_memory()
    return max(1, min(scheduler.max_num_seqs * per_sequence, free // 2 // size))


def allocate_cache(
    model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """The pages. Raises ConfigError where their memory cannot be had."""
    try:
        return KVCache.allocate(model, num_blocks, block_size, dtype, device)
    except RuntimeError as error:
        size = num_blocks * KVCache.bytes_per_block(model, block_size, dtype)
        raise ConfigError(f"kv_memory: {size} bytes cannot be had: {error}") from error


def give_back_memory() -> None:
    """What was freed goes back to the machine, where the C library keeps it for later (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
