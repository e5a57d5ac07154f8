"""Triton's products, norms and blocks under the interpreter: what torch computes in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation
from engine.model.attention.reference import NaiveAttention
from engine.model.cuda_layers import ProductTile, TritonNorm, TritonProduct, use_triton
from engine.model.rope import RotaryTable
from tests.models import random_model, tiny_config

TILE = ProductTile(rows=32, out=16, inner=32, num_warps=1, num_stages=1)


@pytest.mark.parametrize(
    ("switches", "dtype"),
    [
        ({"activation": "gelu_tanh"}, torch.float32),
        ({"parallel_residual": True, "head_bias": True, "tie_embeddings": False}, torch.bfloat16),
        (
            {"norm": "rmsnorm", "qk_norm": "before", "qk_norm_weight": True, "activation": "relu2"},
            torch.float32,
        ),
        ({"norm_weight": False, "mlp_bias": False, "activation": "relu"}, torch.float16),
    ],
)
def test_a_model_computes_the_same(switches: dict[str, object], dtype: torch.dtype) -> None:
    config = tiny_config(num_layers=1, **switches)
    model = random_model(config).to(dtype)
    expected = copy.deepcopy(model).double()
    use_triton(model, wide=())
    attention = NaiveAttention(RotaryTable.for_model(config), config.num_heads)
    token_ids = torch.arange(3)
    with torch.inference_mode():
        actual = model.logits(model(token_ids, attention))
        reference = expected.logits(expected(token_ids, attention))
    assert actual.dtype == torch.float32  # whatever the weights are
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (actual - reference).abs().max() < tolerance * reference.abs().max()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations(activation: Activation) -> None:
    linear = nn.Linear(20, 40).requires_grad_(False)
    rows = 4 * torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    rows[0] *= 100  # both ends of the curve
    wide = copy.deepcopy(linear).double()(rows.double())
    expected = F.gelu(wide, approximate="tanh" if activation == "gelu_tanh" else "none")
    actual = TritonProduct(linear, activation)(rows)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_a_product_does_not_depend_on_the_batch() -> None:
    linear = nn.Linear(40, 24, dtype=torch.bfloat16).requires_grad_(False)
    rows = torch.randn(37, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    residual = torch.randn(37, 24).bfloat16()
    product = TritonProduct(linear, None)
    whole, added = product(rows), product.add_to(residual, rows)
    for first, end in ((0, 1), (3, 20), (36, 37)):
        assert torch.equal(product(rows[first:end]), whole[first:end])
        part = product.add_to(residual[first:end], rows[first:end])
        assert torch.equal(part, added[first:end])


def test_a_tile_with_other_bits_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where rounding to the weight's type would hide them."""
    linear = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
    product = TritonProduct(linear, None)

    def compute(rows: Tensor, tile: ProductTile, *, out_dtype: torch.dtype) -> Tensor:
        neighbourly = tile.num_warps == 7 and len(rows) > tile.rows
        return (rows.float() * (1 + 2**-20 * neighbourly)).to(out_dtype)

    monkeypatch.setattr(product, "compute", compute)
    other = ProductTile(32, 16, 32, num_warps=7, num_stages=1)
    assert product.find_wide([other]) is product.narrow
    assert product.find_wide([other, TILE]) is TILE


def test_a_row_of_a_norm_does_not_depend_on_the_batch() -> None:
    norm = TritonNorm(nn.LayerNorm(20))
    rows = torch.randn(5, 20)
    whole = norm(rows)
    assert torch.equal(norm(rows[2:3]), whole[2:3])
    assert torch.equal(norm(rows[::2]), whole[::2])
    assert norm(rows[:0]).shape == (0, 20)
