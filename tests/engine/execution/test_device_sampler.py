"""The device's sampler against the host's, token by token, under Triton's interpreter."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.execution import device_sampler
from engine.execution.device_sampler import WIDTH, DeviceSampler, read_logprobs
from engine.execution.sampler import Sampler
from engine.execution.sampling_tensors import SamplingTensors
from engine.messages import TokenLogprobs
from engine.params import MAX_BIASES, MAX_LOGPROBS, SamplingParams
from engine.request import Request

VOCAB = 37
UNUSED = [0, 30]
CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.5, top_p=0.7),
    SamplingParams(temperature=1e-6),
    SamplingParams(min_p=0.2, top_k=VOCAB + 5),
    SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.0, repetition_penalty=1.7),
    SamplingParams(temperature=0.0, repetition_penalty=0.3, frequency_penalty=9.0),
    SamplingParams(temperature=0.0, frequency_penalty=2.4, presence_penalty=-0.7),
    SamplingParams(presence_penalty=1.5, logit_bias={5: 2.5, 36: -1.0}),
    SamplingParams(temperature=0.0, logit_bias={17: 9.0, 3: 9.5}),
    SamplingParams(logit_bias={each: each / 7 for each in range(VOCAB)}, repetition_penalty=1.2),
    SamplingParams(top_p=0.8, top_k=9, frequency_penalty=0.3, logit_bias={0: 100.0, 2: -100.0}),
]


def request(
    params: SamplingParams, seed: int, output: list[int], choice: int, prompt: list[int]
) -> Request:
    return Request(
        f"{seed}",
        prompt,
        params,
        seed=seed,
        max_tokens=999,
        stop_token_ids=frozenset(),
        output_token_ids=output,
        choice=choice,
    )


def some_requests(params: SamplingParams) -> list[Request]:
    """With other random numbers and other tokens behind them, the likeliest (32, 15, 15 and 20 of
    `some_logits`) among them; and some beyond the vocabulary."""
    return [
        request(params, 0, [], 0, [1, 32]),
        request(params, 2**63 + 5, [15], 1, [5, 2, 5]),
        request(params, 2**64 - 1, [36, 5, 15, 9, 15, 17], 0, list(range(VOCAB))),
        request(params, 12345, [20, 4, 20], 1, [VOCAB, VOCAB + 1]),
    ]


def some_logits(count: int = 4) -> Tensor:
    logits = torch.randn(count, VOCAB + 3, generator=torch.Generator().manual_seed(1)) * 2
    logits[:, 4] = logits[:, 9]  # ties stay together
    return logits


def sample(logits: Tensor, params: SamplingTensors) -> Tensor:
    sampled = torch.full((len(logits), WIDTH), -7, dtype=torch.int32)
    DeviceSampler(VOCAB, UNUSED, "cpu").sample(logits, params, sampled)
    return sampled


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a row is several."""
    monkeypatch.setattr(device_sampler, "BLOCK", 16)


@pytest.mark.parametrize("params", PARAMS)
def test_takes_the_tokens_that_the_host_takes(params: SamplingParams) -> None:
    logits, requests = some_logits(), some_requests(params)
    expected = Sampler(VOCAB, UNUSED).sample(logits.clone(), requests)
    before = logits.clone()
    sampled = sample(logits, SamplingTensors.of(requests, VOCAB, CPU))
    assert sampled[:, 0].tolist() == [token.token_id for token in expected]
    assert (sampled[:, 1:] == -7).all()  # nobody asked
    assert torch.equal(logits, before)


def test_the_kinds_of_changes_do_change() -> None:
    """Else the test above would hold for a sampler that ignores them."""
    plain = SamplingParams(temperature=0.0)
    for params in PARAMS[7:10] + PARAMS[11:12]:
        tokens = []
        for each in (plain, params):
            sampled = sample(some_logits(), SamplingTensors.of(some_requests(each), VOCAB, CPU))
            tokens.append(sampled[:, 0].tolist())
        assert tokens[0] != tokens[1], params


def test_as_many_biases_as_admission_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_sampler, "BLOCK", 1024)
    vocab = MAX_BIASES + 100
    generator = torch.Generator().manual_seed(2)
    logits, biases = torch.randn(1, vocab, generator=generator), torch.rand(MAX_BIASES)
    ids = torch.randperm(vocab, generator=generator)[:MAX_BIASES]
    params = SamplingParams(
        temperature=0.0, logit_bias=dict(zip(ids.tolist(), biases.tolist(), strict=True))
    )
    one = [request(params, 0, [], 0, [1])]
    sampled = torch.zeros(1, WIDTH, dtype=torch.int32)
    DeviceSampler(vocab, device="cpu").sample(logits, SamplingTensors.of(one, vocab, CPU), sampled)
    logits[0, ids] += biases
    assert sampled[0, 0] == logits.argmax()


def logprobs(sampled: Tensor, count: int) -> list[TokenLogprobs]:
    return [read_logprobs(line, count) for line in sampled.numpy()]


@pytest.mark.parametrize("count", [0, 1, 5, MAX_LOGPROBS])
def test_log_probabilities_are_the_models(count: int) -> None:
    """Before biases and penalties, of the token that these led to; against float64."""
    params = SamplingParams(frequency_penalty=2.0, logit_bias={7: 3.0}, logprobs=count)
    logits, requests = some_logits(), some_requests(params)
    expected = Sampler(VOCAB, UNUSED).sample(logits.clone(), requests)
    sampled = sample(logits, SamplingTensors.of(requests, VOCAB, CPU))
    exact = logits[:, :VOCAB].double()
    exact[:, UNUSED] = -torch.inf
    exact = exact.log_softmax(-1)
    told = logprobs(sampled, count)
    for row, (each, token) in enumerate(zip(told, expected, strict=True)):
        assert token.logprobs is not None
        assert sampled[row, 0] == token.token_id
        assert each.logprob == pytest.approx(float(exact[row, token.token_id]), abs=1e-6)
        ids = sorted(range(VOCAB), key=lambda token_id: (-exact[row, token_id], token_id))
        assert [token_id for token_id, _ in each.top] == ids[:count]
        assert [token_id for token_id, _ in token.logprobs.top] == ids[:count]
        for token_id, value in each.top:
            assert value == pytest.approx(float(exact[row, token_id]), abs=1e-6)
        assert each.logprob == pytest.approx(token.logprobs.logprob, abs=1e-6)


def test_equal_logits_are_told_in_the_order_of_their_ids() -> None:
    """Across blocks; the ids that no token has come last."""
    logits = torch.zeros(1, VOCAB)
    logits[0, [33, 2, 20]] = 1.0
    params = SamplingTensors.greedy(1, "cpu")
    params.num_logprobs.fill_(MAX_LOGPROBS)
    (told,) = logprobs(sample(logits, params), MAX_LOGPROBS)
    ids = [2, 20, 33, *(each for each in range(1, VOCAB) if each not in (2, 20, 33, 30))]
    assert [token_id for token_id, _ in told.top] == ids[:MAX_LOGPROBS]
    host = Sampler(VOCAB, UNUSED)
    one = [request(SamplingParams(logprobs=MAX_LOGPROBS), 0, [], 0, [1])]
    (token,) = host.sample(logits.clone(), one)
    assert token.logprobs is not None
    assert [token_id for token_id, _ in token.logprobs.top] == ids[:MAX_LOGPROBS]
    (scored,) = host.score(logits.clone(), [1], MAX_LOGPROBS)
    assert scored.top == token.logprobs.top


def test_a_vocabulary_may_be_smaller_than_what_is_asked_for() -> None:
    one = [request(SamplingParams(temperature=0.0, logprobs=20), 0, [], 0, [1])]
    logits = torch.tensor([[0.5, 2.0, 1.0]])
    sampled = torch.zeros(1, WIDTH, dtype=torch.int32)
    DeviceSampler(3, [0], "cpu").sample(logits, SamplingTensors.of(one, 3, CPU), sampled)
    (told,) = logprobs(sampled, 3)
    (token,) = Sampler(3, [0]).sample(logits, one)
    assert token.logprobs is not None
    assert [token_id for token_id, _ in told.top] == [1, 2, 0]
    assert [token_id for token_id, _ in token.logprobs.top] == [1, 2, 0]
    assert told.top[2][1] == -np.inf
    assert told.top[0][1] == pytest.approx(token.logprobs.top[0][1])


def test_a_row_does_not_depend_on_the_others_and_absent_ones_are_left() -> None:
    rows = [replace_logprobs(params, at) for at, params in enumerate(PARAMS)]
    requests = [some_requests(params)[at % 4] for at, params in enumerate(rows)]
    logits = some_logits(len(rows))
    params = SamplingTensors.of(requests, VOCAB, CPU)
    whole = sample(logits, params)
    for at in range(len(rows)):
        alone = SamplingTensors.of(requests[at : at + 1], VOCAB, CPU)
        assert torch.equal(sample(logits[at : at + 1], alone), whole[at : at + 1])
    present = torch.tensor([at % 3 for at in range(len(rows))], dtype=torch.int32)
    some = sample(logits, replace(params, present=present))
    assert torch.equal(some[present > 0], whole[present > 0])
    assert (some[present == 0] == -7).all()


def replace_logprobs(params: SamplingParams, count: int) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**fields | {"logprobs": count if count % 2 else None})


def test_logits_that_are_not_finite_give_no_token() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[0, 3], logits[1, 35], logits[2] = float("nan"), float("inf"), float("-inf")
    params = SamplingTensors.greedy(4, "cpu", vocab_size=VOCAB)
    for frequency, wanted in itertools.product((0.0, 1.0), (-1, 2)):  # adjusted or not
        params.penalties[:, 1] = frequency
        params.num_logprobs.fill_(wanted)
        assert sample(logits, params)[:, 0].tolist() == [-1, -1, -1, 1]


def test_logits_must_be_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        sample(torch.zeros(1, VOCAB).bfloat16(), SamplingTensors.greedy(1, "cpu"))


def test_a_row_is_taken_over_and_nothing_is_left_of_the_one_before() -> None:
    state = SamplingTensors.vacant(3, VOCAB, CPU)
    addresses = {name: tensor.data_ptr() for name, tensor in vars(state).items()}
    at = torch.tensor([2, 0])
    full = SamplingParams(repetition_penalty=2.0, logit_bias={1: 5.0, 2: 6.0}, logprobs=3)
    first = SamplingTensors.of(some_requests(full), VOCAB, CPU)
    state.take_over(at, first, torch.tensor([2, 1]), torch.tensor([17, 4]))
    assert state.num_biases.tolist() == [2, 0, 2]
    assert state.bias_ids[:, :2].tolist() == [[1, 2], [0, 0], [1, 2]]
    assert state.index.tolist() == [2, 0, 7]
    assert state.num_logprobs.tolist() == [3, -1, 3]
    expected = np.zeros((2, VOCAB), int)
    expected[0] = 1  # the whole vocabulary is the prompt
    np.add.at(expected[0], [36, 5, 15, 9, 15, 17, 17], 2)
    expected[1, [5, 2]] = 1
    np.add.at(expected[1], [15, 4], 2)
    assert state.counts[at, :VOCAB].tolist() == expected.tolist()
    # Another one comes into the row, with other tokens; and one with no change at all.
    second = SamplingTensors.of(some_requests(full), VOCAB, CPU)
    state.take_over(at[:1], second, torch.tensor([0]), torch.tensor([9]))
    assert state.counts[2].nonzero()[:, 0].tolist() == [1, 9, 32]
    plain = SamplingTensors.of(some_requests(SamplingParams()), VOCAB, CPU)
    assert plain.counts.numel() == plain.bias_ids.numel() == 0
    state.take_over(at[:1], plain, torch.tensor([3]), torch.tensor([9]))
    assert state.penalties[2].tolist() == [1.0, 0.0, 0.0]
    assert (state.num_biases[2], state.num_logprobs[2]) == (0, -1)
    assert {name: tensor.data_ptr() for name, tensor in vars(state).items()} == addresses
