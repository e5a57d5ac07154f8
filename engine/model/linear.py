"""Weight products for serving: packed once, and each row's bits the same in a batch of any size.

A library may compute a row by another kernel, in another order of sums, when more rows stand beside
it; a token would then depend on its neighbours. So a product is chosen once for each weight, never
for each batch, and it is probed before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation
from engine.model.gpt2 import GPT2, MLP, ActivationFunction

PROBED_ROWS = (2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 64, 100, 256, 383, 512)
"""Batch sizes in which a product must give the bits that it gives in the largest of them.

No call has more rows than that: a library may change its ways with size, at sizes we cannot guess.
"""


FUSED: Mapping[Activation | None, tuple[str, str]] = MappingProxyType(
    {
        None: ("none", "none"),
        "gelu": ("gelu", "none"),
        "gelu_tanh": ("gelu", "tanh"),
        "relu": ("relu", "none"),
        "relu2": ("relu", "none"),  # and then squared: IEEE 754 defines a product to the last bit
    }
)
"""What of an activation oneDNN computes inside the product, and by which algorithm."""


class Product(ABC):
    """x -> activation(x weight^T + bias), for rows x [num_rows, in_features], num_rows >= 1."""

    @abstractmethod
    def __call__(self, rows: Tensor) -> Tensor:
        """Return [num_rows, out_features] in the dtype of rows."""


class PackedProduct(Product):
    """oneDNN's product with a prepacked weight; the activation is part of it.

    oneDNN sums over in_features in an order that the packed weight fixes, whatever the number of
    rows, but for one row, which may go to a matrix-vector kernel: a single row is doubled.
    """

    def __init__(self, linear: nn.Linear, activation: Activation | None) -> None:
        weight = linear.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight.default(weight)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._fused, self._algorithm = FUSED[activation]
        self._squared = activation == "relu2"
        self._product = torch.ops.mkldnn._linear_pointwise.default

    @staticmethod
    def supports(dtype: torch.dtype) -> bool:
        """Whether this machine's oneDNN has the product for a dtype."""
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch has no types here
            return False
        if dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return dtype == torch.float32

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        if len(rows) == 1:
            return self._call(torch.cat((rows, rows)))[:1]
        if len(rows) > PROBED_ROWS[-1]:
            return torch.cat([self(part) for part in torch.split(rows, PROBED_ROWS[-1])])
        return self._call(rows)

    def _call(self, rows: Tensor) -> Tensor:
        out: Tensor = self._product(
            rows, self._packed, self._bias, self._fused, [], self._algorithm
        )
        return out.square_() if self._squared else out


class TiledProduct(Product):
    """Plain torch, a fixed number of rows at a time: every call has the same shape.

    The last tile is filled up with zeros. The activation goes row by row, since torch splits an
    elementwise operation over threads at points that depend on its size.
    """

    def __init__(self, linear: nn.Linear, activation: Activation | None, tile_rows: int) -> None:
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation = None if activation is None else ActivationFunction(activation)
        self.tile_rows = tile_rows

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        missing = -len(rows) % self.tile_rows
        tiles = torch.split(F.pad(rows, (0, 0, 0, missing)), self.tile_rows)
        out = torch.cat([F.linear(tile, self._weight, self._bias) for tile in tiles])[: len(rows)]
        if self._activation is None:
            return out
        return torch.stack([self._activation(row) for row in out])


MakeProduct = Callable[[nn.Linear, Activation | None], Product]


class PackedLinear(nn.Module):
    """Serves the product of an nn.Linear, with its activation if one is given. No gradients."""

    def __init__(
        self,
        linear: nn.Linear,
        activation: Activation | None = None,
        make_product: MakeProduct | None = None,
    ) -> None:
        """make_product: the kind of product to use, else choose_product's."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.product = (make_product or choose_product(linear, activation))(linear, activation)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        rows = x.reshape(-1, self.in_features)
        out = self.product(rows) if len(rows) else rows.new_empty(0, self.out_features)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        kind = type(self.product).__name__
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def choose_product(linear: nn.Linear, activation: Activation | None = None) -> MakeProduct:
    """The fastest kind of product whose rows do not depend on each other, by trying.

    The choice depends on shapes and dtype, not on the weight's values, and the trial has fixed
    inputs: a machine chooses the same one every time.
    """
    kinds: list[MakeProduct] = [partial(TiledProduct, tile_rows=16)]
    if PackedProduct.supports(linear.weight.dtype):
        kinds.insert(0, PackedProduct)
    for kind in kinds:
        if is_row_invariant(kind(linear, activation), linear.in_features, linear.weight.dtype):
            return kind
    return partial(TiledProduct, tile_rows=1)  # nothing shares a call with a row


@torch.inference_mode()
def is_row_invariant(product: Product, in_features: int, dtype: torch.dtype) -> bool:
    """Whether rows have the same bits in batches of every probed size, and in every place."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(max(PROBED_ROWS), in_features, generator=generator).to(dtype)
    whole = product(rows)
    for count in PROBED_ROWS:
        start = len(rows) - count  # other places in the batch than in the whole one
        if not torch.equal(product(rows[start:]), whole[start:]):
            return False
    return all(torch.equal(product(rows[at : at + 1]), whole[at : at + 1]) for at in (0, 1, 37))


def pack(model: GPT2) -> None:
    """Replace the linear layers of a loaded model, in place; it can no longer be trained.

    The MLP's activation becomes part of the first product: torch's own GELU may differ in its last
    bit between the middle and the ends of the pieces in which threads share a tensor.
    """
    chosen: dict[tuple[int, int, Activation | None], MakeProduct] = {}

    def packed(linear: nn.Linear, activation: Activation | None = None) -> PackedLinear:
        shape = (linear.in_features, linear.out_features, activation)
        if shape not in chosen:
            chosen[shape] = choose_product(linear, activation)
        return PackedLinear(linear, activation, chosen[shape])

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                fused = isinstance(module, MLP) and name == "up"
                setattr(module, name, packed(child, model.config.activation if fused else None))
        if isinstance(module, MLP):
            module.activation = nn.Identity()
