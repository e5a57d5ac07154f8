"""The device's sampler against the host's, token by token, under Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.execution import device_sampler
from engine.execution.device_sampler import DeviceSampler, SamplingTensors
from engine.execution.sampler import Sampler
from engine.params import SamplingParams
from engine.request import Request

VOCAB = 37
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.5, top_p=0.7),
    SamplingParams(temperature=1e-6),
    SamplingParams(min_p=0.2, top_k=VOCAB + 5),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
]


def tensors(requests: list[Request]) -> SamplingTensors:
    params = [request.params for request in requests]
    return SamplingTensors(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32),
        seed=torch.from_numpy(np.array([r.seed for r in requests], np.uint64).view(np.int64)),
        index=torch.tensor([r.num_output_tokens for r in requests], dtype=torch.int32),
        choice=torch.tensor([r.choice for r in requests], dtype=torch.int32),
    )


def request(params: SamplingParams, seed: int, index: int, choice: int) -> Request:
    return Request(
        "r",
        [1],
        params,
        seed=seed,
        max_tokens=999,
        stop_token_ids=frozenset(),
        output_token_ids=[2] * index,
        choice=choice,
    )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a row is several."""
    monkeypatch.setattr(device_sampler, "BLOCK", 32)


@pytest.mark.parametrize("params", PARAMS)
def test_takes_the_tokens_that_the_host_takes(params: SamplingParams) -> None:
    logits = torch.randn(4, VOCAB + 3, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, 4] = logits[:, 9]  # ties stay together
    seeds = [0, 2**63 + 5, 2**64 - 1, 12345]
    requests = [request(params, seed, row, row % 2) for row, seed in enumerate(seeds)]
    expected = Sampler(VOCAB, [0, 30]).sample(logits.clone(), requests)
    tokens = torch.full((4,), -7, dtype=torch.int32)
    DeviceSampler(VOCAB, [0, 30], "cpu").sample(logits, tensors(requests), tokens)
    assert tokens.tolist() == [token.token_id for token in expected]


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 3], logits[1, 35], logits[2] = float("nan"), float("inf"), float("-inf")
    tokens = torch.zeros(4, dtype=torch.int32)
    DeviceSampler(VOCAB, [0], "cpu").sample(logits, SamplingTensors.greedy(4, "cpu"), tokens)
    assert tokens.tolist() == [-1, -1, -1, 1]
