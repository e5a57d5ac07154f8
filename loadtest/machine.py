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
    """read_gb_s: memory read by all threads; gemm: products of 1024 x 1024, by dtype."""

    processor: str
    threads: int
    torch_version: str
    read_gb_s: float
    gemm_float32_gflop_s: float
    gemm_bfloat16_gflop_s: float

    @classmethod
    def measure(cls, threads: int | None = None) -> Machine:
        """About a second of work; threads: as many as the engine has, else torch's choice.

        The limits are the CPU's.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            buffer = torch.ones(64 * 2**20, dtype=torch.float32)
            read = buffer.nbytes / best_seconds(buffer.sum)
            return cls(
                processor=_processor(),
                threads=torch.get_num_threads(),
                torch_version=torch.__version__,
                read_gb_s=round(read / 1e9, 1),
                gemm_float32_gflop_s=_gemm(torch.float32),
                gemm_bfloat16_gflop_s=_gemm(torch.bfloat16),
            )
        finally:
            torch.set_num_threads(before)

    def gemm_gflop_s(self, dtype: str) -> float:
        """Of float32 or bfloat16."""
        rates = {"float32": self.gemm_float32_gflop_s, "bfloat16": self.gemm_bfloat16_gflop_s}
        return rates[dtype]


def _gemm(dtype: torch.dtype) -> float:
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return round(2 * 1024**3 / best_seconds(lambda: a @ b) / 1e9, 1)


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {capability}"
