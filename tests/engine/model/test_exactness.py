"""The whole network as it serves: a token's logits are the same bits however the work is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from engine.model.attention.select import select_backend
from engine.model.gpt2 import GPT2
from engine.model.linear import pack
from engine.model.serving import fuse
from tests.engine.model.attention.steps import (
    Chunk,
    MakeBackend,
    Sequences,
    make_backend,
)
from tests.models import random_model, tiny_config

__all__ = ["make_backend"]

LENGTHS = [150, 9]
PLANS: dict[str, list[list[Chunk]]] = {
    "chunks": [[(0, 0, 70), (1, 0, 1)], [(1, 1, 9)], [(0, 70, 73)], [(0, 73, 150)]],
    "one by one": [[(0, p, p + 1)] for p in range(150)] + [[(1, p, p + 1)] for p in range(9)],
    "in company": [[(0, 0, 141)], *([(1, p, p + 1), (0, 141 + p, 142 + p)] for p in range(9))],
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Unless a test says otherwise; the number of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def _logits(
    model: GPT2, make: MakeBackend, dtype: torch.dtype, plan: list[list[Chunk]]
) -> list[Tensor]:
    """Logits of every token, by sequence."""
    places = Sequences.random(model.config, LENGTHS, 64, dtype)
    token_ids = [torch.arange(length) % 200 + seq for seq, length in enumerate(LENGTHS)]
    backend = places.build(make)
    rows: list[list[Tensor]] = [[] for _ in LENGTHS]
    for chunks in plan:
        ids = torch.cat([token_ids[seq][first:end] for seq, first, end in chunks])
        logits = model.logits(model(ids, backend.bind(places.metadata(chunks))))
        sizes = [end - first for _, first, end in chunks]
        for (seq, _, _), part in zip(chunks, logits.split(sizes), strict=True):
            rows[seq].append(part)
    return [torch.cat(parts) for parts in rows]


MAKE_READY: dict[str, Callable[[GPT2], object]] = {
    "packed": pack,
    "fused": fuse,
    "int8": partial(fuse, quantize="int8"),
}


@pytest.fixture(params=MAKE_READY)
def make_ready(request: pytest.FixtureRequest) -> Callable[[GPT2], object]:
    """Every way in which a model is served."""
    return MAKE_READY[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("plan", "threads"), [("chunks", 3), ("one by one", 1), ("in company", 2)])
def test_logits_do_not_depend_on_how_the_work_is_cut(
    make_backend: MakeBackend,
    make_ready: Callable[[GPT2], object],
    dtype: torch.dtype,
    plan: str,
    threads: int,
) -> None:
    model = random_model(tiny_config()).to(dtype)
    make_ready(model)
    expected = _logits(model, make_backend, dtype, [[(0, 0, 150), (1, 0, 9)]])
    torch.set_num_threads(threads)
    actual = _logits(model, make_backend, dtype, PLANS[plan])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


SWITCHES: dict[str, dict[str, object]] = {
    "parallel": {"parallel_residual": True, "head_bias": True, "tie_embeddings": False},
    "modded": {
        "norm": "rmsnorm",
        "norm_weight": False,
        "qk_norm": "before",
        "activation": "relu2",
        "bias": False,
    },
    "weighted": {
        "norm": "rmsnorm",
        "qk_norm": "before",
        "qk_norm_weight": True,
        "activation": "relu",
        "attention_bias": False,
    },
    "bare": {"norm_weight": False, "mlp_bias": False, "activation": "gelu_tanh"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(("plan", "threads"), [("chunks", 3), ("in company", 2)])
def test_with_every_switch(
    make_ready: Callable[[GPT2], object], switches: str, dtype: torch.dtype, plan: str, threads: int
) -> None:
    model = random_model(tiny_config(**SWITCHES[switches])).to(dtype)
    make_ready(model)
    expected = _logits(model, select_backend, dtype, [[(0, 0, 150), (1, 0, 9)]])
    torch.set_num_threads(threads)
    actual = _logits(model, select_backend, dtype, PLANS[plan])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 100, 768])
def test_a_row_of_an_rms_norm_does_not_depend_on_the_batch(width: int, dtype: torch.dtype) -> None:
    norm = torch.nn.RMSNorm(width, 1e-5).to(dtype)
    rows = torch.randn(511, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = norm(rows)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in (1, 2, 3, 7, 16, 33, 64, 100, 511):
            start = (len(rows) - count) // 3
            assert torch.equal(norm(rows[start : start + count]), whole[start : start + count])
