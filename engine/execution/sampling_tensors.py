"""What tokens depend on beside the logits, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.sampler import has_penalty
from engine.execution.transfer import upload
from engine.params import MAX_BIASES
from engine.request import Request

ALIGNMENT = 16
"""Of the tokens of a row, so that several are read at once."""


def counts_width(vocab_size: int) -> int:
    """The least number of tokens that is aligned and not below vocab_size."""
    return -(-vocab_size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class SamplingTensors:
    """What the tokens of rows depend on, each [num_rows] or [num_rows, width].

    present int32        0: nobody is in the row, and no token comes
    temperature float32 (0: greedy), top_k int32 (0: all), top_p float64, min_p float32
    seed int64           the bits of the unsigned one
    index int32          the stream index of the token
    choice int32
    penalties float32    [num_rows, 3]: repetition, frequency, presence
    counts int32         [num_rows, counts_width(vocab_size)], read of rows with a penalty only:
                         twice how often the output has a token, and 1 if the prompt has it
    num_biases int32, bias_ids int32, bias_values float32
                         what is added to the logits of which tokens; the last two are as wide as
                         the most biases of a row, or wider
    num_logprobs int32   how many of the likeliest tokens are told; -1: no log-probability at all
    """

    present: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    index: Tensor
    choice: Tensor
    penalties: Tensor
    counts: Tensor
    num_biases: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    num_logprobs: Tensor

    @classmethod
    def greedy(
        cls,
        num_rows: int,
        device: torch.device | str,
        *,
        vocab_size: int = 0,
        max_biases: int = 0,
    ) -> SamplingTensors:
        """Rows that take the likeliest token. vocab_size: 0: none is to have a penalty."""

        def full(value: float, dtype: torch.dtype, *width: int) -> Tensor:
            return torch.full((num_rows, *width), value, dtype=dtype, device=device)

        penalties = full(0.0, torch.float32, 3)
        penalties[:, 0].fill_(1.0)
        return cls(
            present=full(1, torch.int32),
            temperature=full(0.0, torch.float32),
            top_k=full(0, torch.int32),
            top_p=full(1.0, torch.float64),
            min_p=full(0.0, torch.float32),
            seed=full(0, torch.int64),
            index=full(0, torch.int32),
            choice=full(0, torch.int32),
            penalties=penalties,
            counts=full(0, torch.int32, counts_width(vocab_size)),
            num_biases=full(0, torch.int32),
            bias_ids=full(0, torch.int32, max_biases),
            bias_values=full(0.0, torch.float32, max_biases),
            num_logprobs=full(-1, torch.int32),
        )

    @classmethod
    def vacant(cls, num_rows: int, vocab_size: int, device: torch.device | str) -> SamplingTensors:
        """Rows for whoever comes."""
        return cls.greedy(num_rows, device, vocab_size=vocab_size, max_biases=MAX_BIASES)

    @classmethod
    def of(
        cls, requests: Sequence[Request], vocab_size: int, device: torch.device
    ) -> SamplingTensors:
        """Those of the next token of each request, of which all tokens are known."""
        params = [request.params for request in requests]
        biases = [each.logit_bias for each in params]
        widest = max(map(len, biases))
        bias_ids = np.zeros((len(requests), widest), np.int32)
        bias_values = np.zeros((len(requests), widest), np.float32)
        for row, each in enumerate(biases):
            bias_ids[row, : len(each)] = list(each)
            bias_values[row, : len(each)] = list(each.values())
        arrays: dict[str, NDArray[np.generic]] = {
            "present": np.ones(len(requests), np.int32),
            "temperature": np.array([each.temperature for each in params], np.float32),
            "top_k": np.array([each.top_k for each in params], np.int32),
            "top_p": np.array([each.top_p for each in params], np.float64),
            "min_p": np.array([each.min_p for each in params], np.float32),
            "seed": np.array([each.seed for each in requests], np.uint64).view(np.int64),
            "index": np.array([each.num_output_tokens for each in requests], np.int32),
            "choice": np.array([each.choice for each in requests], np.int32),
            "penalties": np.array(
                [
                    (each.repetition_penalty, each.frequency_penalty, each.presence_penalty)
                    for each in params
                ],
                np.float32,
            ),
            "num_biases": np.array([len(each) for each in biases], np.int32),
            "bias_ids": bias_ids,
            "bias_values": bias_values,
            "num_logprobs": np.array(
                [
                    -1 if each.logprobs is None else min(each.logprobs, vocab_size)
                    for each in params
                ],
                np.int32,
            ),
        }
        places, values = _counts(requests, vocab_size)
        where, what, *contents = upload([places, values, *arrays.values()], device)
        width = counts_width(vocab_size) if len(places) else 0
        counts = torch.zeros((len(requests), width), dtype=torch.int32, device=device)
        counts.view(-1)[where] = what
        return cls(counts=counts, **dict(zip(arrays, contents, strict=True)))

    def first(self, num_rows: int) -> SamplingTensors:
        """Views of the first num_rows rows."""
        return SamplingTensors(**{name: each[:num_rows] for name, each in vars(self).items()})

    def take_over(self, rows: Tensor, other: SamplingTensors, of: Tensor, tokens: Tensor) -> None:
        """Write to some rows what stands in the rows `of` of another, and move on: they got these
        tokens. Rows, of and tokens are int64 on the device, tokens not below 0."""
        for name, target in vars(self).items():
            content: Tensor = getattr(other, name)
            narrow = target[:, : content.shape[1]] if content.ndim == 2 else target
            narrow[rows] = content[of]
        self.index[rows] += 1
        if other.counts.shape[1]:
            self.counts[rows, tokens] += 2


def _counts(
    requests: Sequence[Request], vocab_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """What `counts` is to hold of requests with a penalty, but for zeros: where, in the tensor laid
    out flat, and what."""
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
    for row, request in enumerate(requests):
        if not has_penalty(request):
            continue
        ids, numbers = np.unique(np.array(request.token_ids, np.int64), return_inverse=True)
        count = 2 * np.bincount(numbers[request.num_prompt_tokens :], minlength=len(ids))
        count[numbers[: request.num_prompt_tokens]] += 1  # however often it is there
        within = ids < vocab_size
        places.append(row * counts_width(vocab_size) + ids[within])
        values.append(count[within].astype(np.int32))
    return np.concatenate(places), np.concatenate(values)
