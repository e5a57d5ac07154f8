"""Sampling on CUDA, without the host: it can be captured in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.kernels import sampling as kernels
from engine.execution.sampler import changes_logits
from engine.model.kernels.common import next_power_of_2
from engine.request import Request

BLOCK = 4096
"""Logits that a program reads at once."""


@dataclass(frozen=True)
class SamplingTensors:
    """What the tokens of rows depend on, on the device, each [num_rows].

    temperature float32 (0: greedy), top_k int32 (0: all), top_p float64, min_p float32; seed
    int64, the bits of the unsigned one; index int32, the stream index of the token; choice int32.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor
    choice: Tensor

    @classmethod
    def greedy(cls, num_rows: int, device: torch.device | str) -> SamplingTensors:
        """Rows that take the likeliest token."""

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        return cls(
            temperature=full(0.0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1.0, torch.float64),
            min_p=full(0.0, torch.float32),
            seed=full(0, torch.int64),
            index=full(0, torch.int32),
            choice=full(0, torch.int32),
        )

    @staticmethod
    def of(requests: Sequence[Request]) -> dict[str, NDArray[np.generic]]:
        """The values for the next token of each request, by name."""
        params = [request.params for request in requests]
        return {
            "temperature": np.array([each.temperature for each in params], np.float32),
            "top_k": np.array([each.top_k for each in params], np.int32),
            "top_p": np.array([each.top_p for each in params], np.float64),
            "min_p": np.array([each.min_p for each in params], np.float32),
            "seed": np.array([each.seed for each in requests], np.uint64).view(np.int64),
            "index": np.array([each.num_output_tokens for each in requests], np.int32),
            "choice": np.array([each.choice for each in requests], np.int32),
        }


def samples_on_device(request: Request) -> bool:
    """Whether its tokens need nothing of the host; the same for all of them."""
    return request.params.logprobs is None and not changes_logits(request)


class DeviceSampler:
    """Temperature, top-k, top-p, min-p and one stream of random numbers for each row.

    Penalties and log-probabilities stay with `Sampler`, on the host.
    """

    def __init__(
        self,
        vocab_size: int,
        unused_token_ids: Sequence[int] = (),
        device: torch.device | str = "cuda",
    ) -> None:
        """vocab_size: ids at or above it are never sampled, nor are the unused ones."""
        self.vocab_size = vocab_size
        self._allowed = torch.ones(vocab_size, dtype=torch.int8, device=device)
        self._allowed[list(unused_token_ids)] = 0

    def sample(self, logits: Tensor, params: SamplingTensors, tokens: Tensor) -> None:
        """Logits [num_rows, >= vocab_size] -> tokens int32 [num_rows], written in place; -1 where a
        row's logits are NaN or infinite: no token would be right."""
        kernels.sample[(len(logits),)](
            logits,
            self._allowed,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            params.index,
            params.choice,
            tokens,
            logits.stride(0),
            vocab_size=self.vocab_size,
            block=min(BLOCK, next_power_of_2(self.vocab_size)),
            num_warps=8,
            enable_fp_fusion=False,
        )
