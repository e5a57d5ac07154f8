"""What this machine can do at best, measured in the same run as what we make of it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


def best_seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Machine:
    """read_gb_s: memory read by all threads; gemm_gflop_s: a large product in the model's dtype."""

    processor: str
    threads: int
    torch_version: str
    read_gb_s: float
    gemm_gflop_s: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> Machine:
        """About a second of work. The limits are the CPU's."""
        buffer = torch.ones(64 * 2**20, dtype=torch.float32)
        read = buffer.nbytes / best_seconds(buffer.sum)
        a, b = torch.randn(2, 1024, 1024).to(dtype)
        gemm = 2 * 1024**3 / best_seconds(lambda: a @ b)
        return cls(
            processor=_processor(),
            threads=torch.get_num_threads(),
            torch_version=torch.__version__,
            read_gb_s=round(read / 1e9, 1),
            gemm_gflop_s=round(gemm / 1e9, 1),
        )


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}"
