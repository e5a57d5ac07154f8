"""Sampling on CUDA, without the host: it can be captured in a graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.kernels import logprobs as logprob_kernels
from engine.execution.kernels import penalties as penalty_kernels
from engine.execution.kernels import sampling as kernels
from engine.execution.sampling_tensors import SamplingTensors, counts_width
from engine.messages import TokenLogprobs
from engine.model.kernels.common import next_power_of_2
from engine.params import MAX_LOGPROBS
from engine.request import Request

BLOCK = 4096
"""Logits that a program reads at once."""

WIDTH = 2 + 2 * MAX_LOGPROBS
"""Numbers that a row gives, int32: its token; the bits of that one's log-probability; the likeliest
tokens; the bits of theirs. Of a row that wants no log-probability, the token only."""


def samples_on_device(request: Request) -> bool:
    """Whether its tokens need nothing of the host; the same for all of them."""
    return request.params.grammar is None


def read_logprobs(line: NDArray[np.int32], count: int) -> TokenLogprobs:
    """What a row of WIDTH numbers tells of its token and the `count` likeliest ones."""
    floats = line.view(np.float32)
    ids, values = line[2 : 2 + count], floats[2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + count]
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprobs(float(floats[1]), top)


class DeviceSampler:
    """What `Sampler` does, but for grammars: one program a row, or one for a part of it."""

    def __init__(
        self,
        vocab_size: int,
        unused_token_ids: Sequence[int] = (),
        device: torch.device | str = "cuda",
    ) -> None:
        """vocab_size: ids at or above it are never sampled, nor are the unused ones."""
        self._allowed = torch.zeros(counts_width(vocab_size), dtype=torch.int8, device=device)
        self._allowed[:vocab_size] = 1
        self._allowed[list(unused_token_ids)] = 0

    def sample(self, logits: Tensor, params: SamplingTensors, sampled: Tensor) -> None:
        """Logits float32 [num_rows, >= vocab_size] -> sampled int32 [num_rows, WIDTH], written in
        place where a row is present. Its token is -1 where its logits are NaN or infinite: none
        would be right."""
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            raise ValueError(
                f"logits must be float32 and contiguous along a row, got {logits.dtype}, "
                f"strides {logits.stride()}"
            )
        num_rows = len(logits)
        adjusted = torch.empty_strided(
            logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device
        )
        vocab_size = min(len(self._allowed), logits.shape[1])
        block = min(BLOCK, next_power_of_2(vocab_size))
        shape = {"vocab_size": vocab_size, "block": block}
        options = {"num_warps": 8, "enable_fp_fusion": False}
        penalty_kernels.adjust[(num_rows, -(-vocab_size // block))](
            logits,
            adjusted,
            params.present,
            params.penalties,
            params.counts,
            params.num_biases,
            params.bias_ids,
            params.bias_values,
            logits.stride(0),
            params.bias_ids.stride(0),
            counts_width=len(self._allowed),
            **shape,
            **options,
        )
        kernels.sample[(num_rows,)](
            logits,
            adjusted,
            self._allowed,
            params.present,
            params.penalties,
            params.num_biases,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.seed,
            params.index,
            params.choice,
            sampled,
            logits.stride(0),
            sampled.stride(0),
            **shape,
            **options,
        )
        logprob_kernels.logprobs[(num_rows,)](
            logits,
            self._allowed,
            params.present,
            params.num_logprobs,
            sampled,
            logits.stride(0),
            sampled.stride(0),
            most=MAX_LOGPROBS,
            **shape,
            **options,
        )
