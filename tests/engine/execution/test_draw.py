"""Drawing by torch and by every compiled kernel, against a full sort in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.execution import draw as plain
from engine.execution.cpu_draw import KernelDraw
from engine.execution.draw import NUCLEUS_TOKENS, Draw, nucleus_threshold
from engine.execution.uniforms import uniforms
from engine.model.library import KernelUnavailableError, supported_variants
from engine.params import SamplingParams
from engine.request import Request
from tests.engine.execution.test_sampler import request

SHARPEST, FLATTEST = 1e-6, 100.0
FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 2000},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"top_k": 100, "top_p": 0.7},
    {"top_k": 100, "top_p": 0.95, "min_p": 0.02},
]


@pytest.fixture(params=["torch", *supported_variants("draw")])
def draw(request: pytest.FixtureRequest) -> Draw:
    return plain.draw if request.param == "torch" else KernelDraw(request.param)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def expected(logits: Tensor, params: SamplingParams) -> np.ndarray:
    """Probabilities after the filters, each in its turn, on a sorted copy."""
    x = logits.double().numpy()
    weights = np.exp((x - x.max()) / params.temperature)
    if 0 < params.top_k < len(x):
        weights[x < np.sort(x)[-params.top_k]] = 0
    if params.top_p < 1:
        order = np.argsort(-x, kind="stable")
        mass = weights[order].cumsum()
        last = min(int(np.searchsorted(mass, params.top_p * mass[-1])), len(x) - 1)
        weights[x < x[order[last]]] = 0
    weights[weights < params.min_p] = 0
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 20.0])
def test_the_token_is_that_of_a_full_sort(
    draw: Draw, filters: dict[str, float], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5003, generator=generator) * 3
    logits[:, 70:90] = -torch.inf
    params = SamplingParams(temperature=temperature, **filters)  # type: ignore[arg-type]  # by name
    requests = [request(params, seed=seed) for seed in range(len(logits))]
    drawn = draw(logits, range(len(logits)), requests)
    numbers = uniforms(requests)
    for row, token, number in zip(logits, drawn, numbers, strict=True):
        ends = expected(row, params).cumsum()
        begins = np.concatenate(([0.0], ends[:-1]))
        # float32 weights, and a token at a filter's edge, may move a boundary a little
        assert begins[token] - 2e-4 <= number <= ends[token] + 2e-4
        assert row[token].isfinite()


@pytest.mark.parametrize("filters", [{"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_what_is_filtered_never_comes(draw: Draw, filters: dict[str, float]) -> None:
    params = SamplingParams(**filters)  # type: ignore[arg-type]  # by name
    logits = (torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 2).repeat(5000, 1)
    drawn = draw(logits, range(5000), [request(params, seed=seed) for seed in range(5000)])
    kept = np.flatnonzero(expected(logits[0], params))
    assert set(drawn) <= set(kept.tolist())
    assert len(set(drawn)) > len(kept) / 2


def test_ties_stay_together(draw: Draw) -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, -2.0]).repeat(400, 1)
    for filters in ({"top_k": 1}, {"top_p": 0.01}):
        params = SamplingParams(**filters)  # type: ignore[arg-type]  # by name
        drawn = draw(logits, range(400), [request(params, seed=seed) for seed in range(400)])
        assert set(drawn) == {1, 3, 4}


@pytest.mark.parametrize("temperature", [SHARPEST, 1e-3, FLATTEST])
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 255, 256, 257, 1000])
def test_extremes(draw: Draw, temperature: float, size: int) -> None:
    logits = torch.arange(size).float() % 37
    logits[size // 2] = 100.0
    requests = [
        request(SamplingParams(temperature=temperature, **filters), seed=seed)
        for seed, filters in enumerate([{}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 1.0}] * 5)
    ]
    drawn = draw(logits.repeat(len(requests), 1), range(len(requests)), requests)
    assert all(0 <= token < size for token in drawn)
    if temperature <= 1e-3:
        assert set(drawn) == {size // 2}


def test_the_ends_of_the_stream(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((2, 700), -torch.inf)
    logits[:, 300:400] = torch.randn(100)
    ends = np.array([0.0, np.nextafter(1.0, 0.0)])
    for module in ("draw", "cpu_draw"):
        monkeypatch.setattr(f"engine.execution.{module}.uniforms", lambda _: ends)
    requests = [request(SamplingParams()), request(SamplingParams())]
    assert draw(logits, [0, 1], requests) == [300, 399]


def test_a_row_is_drawn_alike_in_any_company(draw: Draw) -> None:
    logits = torch.randn(9, 3000, generator=torch.Generator().manual_seed(2)) * 3
    requests = [
        request(SamplingParams(temperature=0.5 + row, **FILTERS[row]), seed=row)  # type: ignore[arg-type]  # by name
        for row in range(9)
    ]
    alone = [draw(logits, [row], [each])[0] for row, each in enumerate(requests)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert list(draw(logits, range(9), requests)) == alone
    assert list(draw(logits, [7, 2], [requests[7], requests[2]])) == [alone[7], alone[2]]


def test_rows_may_be_longer_than_the_vocabulary(draw: Draw) -> None:
    wide = torch.randn(3, 64)
    wide[:, 50:] = 1000.0
    requests: list[Request] = [request(SamplingParams(), seed=seed) for seed in range(3)]
    assert max(draw(wide[:, :50], [0, 1, 2], requests)) < 50


def test_what_the_kernel_refuses() -> None:
    kernel = KernelDraw()
    one = [request(SamplingParams())]
    with pytest.raises(ValueError, match=r"logits must be float32 .*, got torch\.float64"):
        kernel(torch.zeros(1, 5, dtype=torch.float64), [0], one)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 1\), got \[1\]"):
        kernel(torch.zeros(1, 5), [1], one)
    with pytest.raises(KernelUnavailableError, match="'mmx' is not among"):
        KernelDraw("mmx")


@pytest.mark.parametrize("temperature", [0.5, 5.0, 1e6])
def test_the_nucleus_is_that_of_a_full_sort(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4 * NUCLEUS_TOKENS, generator=generator) * 3
    probabilities = (logits / temperature).softmax(dim=-1)
    enough = torch.tensor([0.1, 0.5, 0.9, 0.99, 0.999999, 1.0], dtype=torch.float64)
    expected = []
    for row, share in zip(probabilities.double().numpy(), enough.tolist(), strict=True):
        ordered = np.sort(row)[::-1]
        expected.append(ordered[min(np.searchsorted(ordered.cumsum(), share), len(row) - 1)])
    assert nucleus_threshold(probabilities, enough)[:, 0].tolist() == expected
