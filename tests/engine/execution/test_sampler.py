"""Sampling against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from engine.execution.sampler import Sampler
from engine.params import SamplingParams
from engine.request import Request

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.5, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -9.0])


def request(params: SamplingParams, seed: int = 0, index: int = 0, choice: int = 0) -> Request:
    return Request(
        f"{seed}.{choice}",
        [3, 3, 1],
        params,
        seed=seed,
        max_tokens=10_000,
        stop_token_ids=frozenset(),
        output_token_ids=[5, 5, 0][:index] if index <= 3 else [5] * index,
        choice=choice,
    )


def draws(params: SamplingParams, count: int = 20_000) -> np.ndarray:
    """How often each token came, over that many seeds."""
    requests = [request(params, seed=seed) for seed in range(count)]
    tokens = Sampler(VOCAB).sample(LOGITS.repeat(count, 1), requests)
    return np.bincount([token.token_id for token in tokens], minlength=VOCAB)


def probabilities(temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(LOGITS.double().numpy() / temperature)
    return np.asarray(weights / weights.sum())


def assert_distribution(counts: np.ndarray, expected: np.ndarray) -> None:
    expected = expected / expected.sum()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    if kept.sum() == 1:
        return
    assert stats.chisquare(counts[kept], expected[kept] * counts.sum()).pvalue > 1e-4


def test_temperature() -> None:
    for temperature in (0.5, 1.0, 2.0):
        counts = draws(SamplingParams(temperature=temperature))
        assert_distribution(counts, probabilities(temperature))


def test_top_k_keeps_ties() -> None:
    expected = probabilities()
    expected[3:] = 0
    for top_k in (2, 3):  # tokens 1 and 2 are equally likely
        assert_distribution(draws(SamplingParams(top_k=top_k)), expected)


def test_top_p() -> None:
    for top_p in (0.3, 0.6, 0.9):
        expected = probabilities()
        mass = np.cumsum(expected)
        last = int(np.searchsorted(mass, top_p))
        expected[expected < expected[last]] = 0
        assert_distribution(draws(SamplingParams(top_p=top_p)), expected)


def test_min_p() -> None:
    expected = probabilities()
    expected[expected < 0.2 * expected.max()] = 0
    assert_distribution(draws(SamplingParams(min_p=0.2)), expected)


def test_filters_together() -> None:
    expected = probabilities(2.0)
    expected[6:] = 0
    mass = np.cumsum(expected / expected.sum())
    expected[int(np.searchsorted(mass, 0.9)) + 1 :] = 0
    expected[expected < 0.4 * expected.max()] = 0
    params = SamplingParams(temperature=2.0, top_k=6, top_p=0.9, min_p=0.4)
    assert_distribution(draws(params), expected)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-4])
def test_cold_is_greedy(temperature: float) -> None:
    assert draws(SamplingParams(temperature=temperature), 100)[0] == 100


def test_unused_and_padded_ids() -> None:
    requests = [request(SamplingParams(temperature=100.0), seed=seed) for seed in range(2000)]
    logits = torch.cat((LOGITS, torch.full((4,), 50.0))).repeat(2000, 1)
    tokens = Sampler(VOCAB, [0, 4]).sample(logits, requests)
    assert {token.token_id for token in tokens} == set(range(VOCAB)) - {0, 4}


def greedy_logprobs(**penalties: float) -> tuple[int, float]:
    params = SamplingParams(temperature=0, logprobs=VOCAB, **penalties)
    (token,) = Sampler(VOCAB).sample(LOGITS[None].clone(), [request(params, index=3)])
    assert token.logprobs is not None
    return token.token_id, token.logprobs.logprob


def test_penalties_choose_and_logprobs_stay_the_models() -> None:
    """The prompt has tokens 3 and 1, the output 5 twice and 0 once."""
    logprobs = LOGITS.double().log_softmax(-1)
    assert greedy_logprobs() == (0, pytest.approx(float(logprobs[0])))
    # 0, 1 and 3 are seen: 2.0 / 1.4 < 1.5, and 2 was not seen.
    assert greedy_logprobs(repetition_penalty=1.4) == (2, pytest.approx(float(logprobs[2])))
    assert greedy_logprobs(presence_penalty=0.4)[0] == 0
    assert greedy_logprobs(presence_penalty=0.6)[0] == 1  # only the output counts
    assert greedy_logprobs(frequency_penalty=0.6)[0] == 1
    assert greedy_logprobs(frequency_penalty=-1.1)[0] == 0
    assert greedy_logprobs(frequency_penalty=-3.0)[0] == 5  # twice in the output


def test_negative_logits_are_multiplied_by_the_repetition_penalty() -> None:
    logits = torch.tensor([[-1.0, -1.2, -1.3]])
    params = SamplingParams(temperature=0, repetition_penalty=1.25)
    one = Request("r", [0], params, seed=0, max_tokens=9, stop_token_ids=frozenset())
    (token,) = Sampler(3).sample(logits, [one])
    assert token.token_id == 1  # -1.25 < -1.2


def test_penalty_counts_grow_with_the_request() -> None:
    sampler = Sampler(VOCAB)
    params = SamplingParams(temperature=0, frequency_penalty=0.3)
    one = Request("r", [9], params, seed=0, max_tokens=99, stop_token_ids=frozenset())
    chosen = []
    for _ in range(6):
        (token,) = sampler.sample(LOGITS[None].clone(), [one])
        one.token_ids.append(token.token_id)
        chosen.append(token.token_id)
    assert chosen == [0, 0, 1, 2, 0, 1]


def test_top_logprobs() -> None:
    params = SamplingParams(temperature=0, logprobs=3)
    (token,) = Sampler(VOCAB).sample(LOGITS[None].clone(), [request(params)])
    assert token.logprobs is not None
    assert token.logprobs.top[0][0] == 0
    assert math.isclose(token.logprobs.top[0][1], token.logprobs.logprob)
    assert len(token.logprobs.top) == 3


def test_rows_do_not_depend_on_their_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    vocab, rows = 5003, 33
    logits = torch.randn(rows, vocab, generator=generator) * 3
    requests = [
        request(
            SamplingParams(
                temperature=0.3 + 0.1 * row,
                top_k=(0, 50, 1)[row % 3],
                top_p=(1.0, 0.9)[row % 2],
                min_p=(0.0, 0.001)[row % 2],
                logprobs=5,
            ),
            seed=row,
        )
        for row in range(rows)
    ]
    together = Sampler(vocab).sample(logits.clone(), requests)
    alone = [
        Sampler(vocab).sample(logits[row : row + 1].clone(), [requests[row]])[0]
        for row in range(rows)
    ]
    assert together == alone


def test_logits_that_are_not_finite_are_an_error() -> None:
    for wrong in (math.nan, math.inf):
        logits = LOGITS.repeat(3, 1)
        logits[1, 4] = wrong
        requests = [request(SamplingParams(temperature=0)) for _ in range(3)]
        with pytest.raises(FloatingPointError, match="not finite"):
            Sampler(VOCAB).sample(logits, requests)
