"""Products for serving: the right numbers, and a row's bits the same in any batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation
from engine.model.attention.reference import NaiveAttention
from engine.model.linear import (
    PackedLinear,
    PackedProduct,
    Product,
    TiledProduct,
    choose_product,
    is_row_invariant,
    pack,
)
from engine.model.rope import RotaryTable
from tests.models import random_model, tiny_config

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(384, 1152), (384, 384), (1536, 384), (384, 1024), (768, 96), (100, 36)]
NUM_ROWS = [1, 2, 3, 7, 16, 33, 64, 100, 511]
MakeProduct = Callable[[nn.Linear, Activation | None], Product]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Unless a test says otherwise; the number of before comes back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.fixture(params=["packed", "tiles of 16", "tiles of 1"])
def make_product(request: pytest.FixtureRequest, dtype: torch.dtype) -> MakeProduct:
    if request.param == "packed":
        if not PackedProduct.supports(dtype):
            pytest.skip(f"no oneDNN product for {dtype}")
        return PackedProduct
    return partial(TiledProduct, tile_rows=int(request.param.split()[-1]))


def _linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype)


def _assert_close(actual: Tensor, expected: Tensor) -> None:
    """To float32's, or to one step of bfloat16's mantissa."""
    assert expected.dtype == torch.float64
    rtol, atol = (2**-7, 1e-3) if actual.dtype == torch.bfloat16 else (1e-5, 1e-6)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "relu2"])
def test_computes_what_torch_computes(
    make_product: MakeProduct, activation: Activation | None, bias: bool, dtype: torch.dtype
) -> None:
    linear = _linear(64, 50, dtype, bias)
    rows = torch.randn(5, 64).to(dtype)
    expected = copy.deepcopy(linear).double()(rows.double())
    if activation is not None:
        expected = {
            "gelu": F.gelu,
            "gelu_tanh": partial(F.gelu, approximate="tanh"),
            "relu": F.relu,
            "relu2": lambda x: F.relu(x) ** 2,
        }[activation](expected)
    product = make_product(linear, activation)
    _assert_close(product(rows), expected)
    assert torch.equal(product(rows[:1]), product(rows)[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", [None, "gelu", "relu2"])
def test_a_row_does_not_depend_on_the_batch(
    shape: tuple[int, int], activation: Activation | None, dtype: torch.dtype
) -> None:
    layer = PackedLinear(_linear(*shape, dtype), activation)
    rows = torch.randn(max(NUM_ROWS), shape[0]).to(dtype)
    whole = layer(rows)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for count in NUM_ROWS:
            start = (len(rows) - count) // 3
            assert torch.equal(layer(rows[start : start + count]), whole[start : start + count])


def test_leading_dimensions_are_kept() -> None:
    layer = PackedLinear(_linear(64, 50, torch.float32))
    assert layer(torch.randn(2, 3, 64)).shape == (2, 3, 50)
    assert layer(torch.randn(64)).shape == (50,)
    assert layer(torch.randn(0, 64)).shape == (0, 50)
    assert "in_features=64" in repr(layer)


class _Neighbourly(Product):
    """A product whose rows depend on how many there are."""

    def __call__(self, rows: Tensor) -> Tensor:
        return rows + len(rows) // 32


def test_the_trial_sees_rows_that_depend_on_others() -> None:
    assert not is_row_invariant(_Neighbourly(), 8, torch.float32)


def test_a_product_that_fails_the_trial_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = _linear(64, 64, torch.float32)
    monkeypatch.setattr(PackedProduct, "__call__", _Neighbourly.__call__)
    product = choose_product(linear)(linear, None)
    assert isinstance(product, TiledProduct)
    monkeypatch.setattr(PackedProduct, "supports", lambda dtype: False)
    monkeypatch.setattr(TiledProduct, "__call__", _Neighbourly.__call__)
    product = choose_product(linear)(linear, None)
    assert isinstance(product, TiledProduct)
    assert product.tile_rows == 1


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu2"])
def test_a_packed_model_computes_the_same(activation: Activation) -> None:
    model = random_model(tiny_config(activation=activation))
    attention = NaiveAttention(RotaryTable.for_model(model.config), model.config.num_heads)
    token_ids = torch.arange(40)
    expected = copy.deepcopy(model).double()
    pack(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    actual = model.logits(model(token_ids, attention))
    reference = expected.logits(expected(token_ids, attention))
    assert (actual - reference).abs().max() < 1e-5 * reference.abs().max()
