"""What this machine can do at best, measured in the same run as what we make of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

BUSY = 0.05
"""Share of the machine that others may take before a figure is called into doubt."""


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


class Others:
    """Watches from its making on how much of the machine other processes take."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def cores(self) -> float:
        """Cores that were busy for others on average; what a hypervisor took away counts."""
        seconds = time.perf_counter() - self._start
        own = _own_seconds() - self._own
        return round(max(0.0, (_busy_seconds() - self._busy - own) / seconds), 2)

    def document(self) -> dict[str, float]:
        """For the JSON: the cores that others took, of how many, and the load average as it is."""
        return {
            "others_cores": self.cores(),
            "cores": os.cpu_count() or 1,
            "load_average": round(psutil.getloadavg()[0], 2),
        }


def doubt(load: dict[str, float]) -> str:
    """A warning where others took more than BUSY of the machine, else ''."""
    others, cores = load["others_cores"], load["cores"]
    if others <= BUSY * cores:
        return ""
    return (
        f"other processes took {others} of {cores:g} cores during this run: "
        "the figures show them too; end them and measure again"
    )


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _guests(times))


def _guests(times: object) -> float:
    """Linux counts guests in `user` already."""
    return float(getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0))


def _own_seconds() -> float:
    """Processor time of this process and of all it started, ended ones too."""
    total = sum(os.times()[:4])
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:4])
        except psutil.NoSuchProcess:  # ended since; its parent has its time
            continue
    return total
