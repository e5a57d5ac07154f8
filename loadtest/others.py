"""What else ran on this machine during a measurement."""

from __future__ import annotations

import os
import time

import psutil

BUSY = 0.05
"""Share of the machine that others may take before a figure is called into doubt."""


class Others:
    """Watches from its making on how much of the machine other processes take."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()
        self._seen: float | None = None

    def stop(self) -> None:
        """What comes from now on does not count, such as the end of servers: a process that ends
        without waiting for its own takes the knowledge of their time with it."""
        self._seen = self._cores()

    def cores(self) -> float:
        """Cores that were busy for others on average; what a hypervisor took away counts."""
        return self._cores() if self._seen is None else self._seen

    def _cores(self) -> float:
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
