"""The processes that train one model together: one, or several that `torchrun` started."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from engine.errors import ConfigError


@dataclass(frozen=True)
class World:
    """rank: this process's number, 0 .. size - 1; device: where it computes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: str) -> World:
        """Join the processes of torchrun, if it started this one; `auto` is CUDA where there is.

        Raises ConfigError for a device that is not there.
        """
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if kind not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda; got {device!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is cuda, and PyTorch finds no CUDA here")
        if not distributed.is_torchelastic_launched():
            return cls(torch.device(kind))
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
        rank, size = distributed.get_rank(), distributed.get_world_size()
        index = distributed.get_node_local_rank()
        where = torch.device("cuda", index) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(where)
        return cls(where, rank, size)

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose gradients are the mean over all processes."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def mean(self, value: Tensor) -> float:
        """Mean of a number over all processes."""
        if self.size > 1:
            distributed.all_reduce(value)
        return value.item() / self.size

    def agree(self, value: int | None) -> int | None:
        """What the first process thinks; None is nothing."""
        if self.size == 1:
            return value
        told = torch.tensor([-1 if value is None else value], device=self.device)
        distributed.broadcast(told, 0)
        return None if told.item() < 0 else int(told.item())

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            distributed.destroy_process_group()
