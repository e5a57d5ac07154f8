"""The layers of a network on CUDA: products and norms whose rows do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from engine.config import Activation
from engine.model.attention.base import Attention
from engine.model.gpt2 import GPT2, Block, QKNorm
from engine.model.kernels import norm as norm_kernels
from engine.model.kernels import product as product_kernels
from engine.model.kernels.common import emulates, next_power_of_2
from engine.model.linear import PackedLinear, Product

FEW_ROWS = 32
"""Up to so many rows a product takes the narrow tile, which reads the weight once for 16 rows."""


@dataclass(frozen=True)
class ProductTile:
    """rows x out elements by one program, `inner` input features at a time."""

    rows: int
    out: int
    inner: int
    num_warps: int
    num_stages: int


WIDE_TILES = (
    ProductTile(rows=64, out=64, inner=64, num_warps=4, num_stages=3),
    ProductTile(rows=64, out=64, inner=64, num_warps=2, num_stages=3),
    ProductTile(rows=32, out=64, inner=64, num_warps=2, num_stages=3),
)
"""For many rows, best first: used only where they give the bits of the narrow one."""


def narrow_tile(out_features: int) -> ProductTile:
    """For few rows: many programs, so that all of the device reads the weight."""
    if out_features <= 1024:
        return ProductTile(rows=16, out=16, inner=128, num_warps=1, num_stages=4)
    return ProductTile(rows=16, out=32, inner=128, num_warps=2, num_stages=4)


class TritonProduct(Product):
    """A product in Triton. Its tile depends on the shape of the weight, and on the number of rows
    only where two tiles give the same bits, which is tried and not assumed."""

    def __init__(
        self,
        linear: nn.Linear,
        activation: Activation | None,
        wide: ProductTile | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        """wide: the tile for many rows; None: the narrow one. See `find_wide`. out_dtype: None:
        that of the rows."""
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation = activation
        self._out_dtype = out_dtype or self._weight.dtype
        self._out_features, self._in_features = self._weight.shape
        self.narrow = narrow_tile(self._out_features)
        self.wide = wide or self.narrow

    def find_wide(self, tiles: Sequence[ProductTile]) -> ProductTile:
        """The first of the tiles that gives the narrow one's bits in float32, in batches that fill
        it and that do not; else the narrow one."""
        if not tiles:
            return self.narrow
        weight = self._weight
        generator = torch.Generator(weight.device).manual_seed(0)
        rows = torch.randn((128, self._in_features), generator=generator, device=weight.device)
        rows = rows.to(weight.dtype)

        def computed(num_rows: int, tile: ProductTile) -> Tensor:
            # Rounding to a smaller type hides most differences, but not always.
            return self.compute(rows[:num_rows], tile, out_dtype=torch.float32)

        expected = computed(len(rows), self.narrow)
        for tile in tiles:
            counts = (len(rows), tile.rows + 1, 1)
            if all(torch.equal(computed(count, tile), expected[:count]) for count in counts):
                return tile
        return self.narrow

    def __call__(self, rows: Tensor) -> Tensor:
        """See Product."""
        return self.compute(rows, self.narrow if len(rows) <= FEW_ROWS else self.wide)

    def add_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """residual [num_rows, out_features] + the product, rounded once."""
        tile = self.narrow if len(rows) <= FEW_ROWS else self.wide
        return self.compute(rows, tile, residual.contiguous())

    def compute(
        self,
        rows: Tensor,
        tile: ProductTile,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The product by a given tile. out_dtype: None: the usual one."""
        rows = rows.contiguous()
        shape = (len(rows), self._out_features)
        out = torch.empty(shape, dtype=out_dtype or self._out_dtype, device=rows.device)
        grid = (-(-len(rows) // tile.rows), -(-self._out_features // tile.out))
        product_kernels.product[grid](
            rows,
            self._weight,
            self._weight if self._bias is None else self._bias,
            out if residual is None else residual,
            out,
            len(rows),
            in_features=self._in_features,
            out_features=self._out_features,
            has_bias=self._bias is not None,
            has_residual=residual is not None,
            activation=self._activation,
            tile_rows=tile.rows,
            tile_out=tile.out,
            tile_in=tile.inner,
            emulated=emulates(rows.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
        return out


class TritonNorm(nn.Module):
    """Serves a LayerNorm or RMSNorm over the last dimension. No gradients."""

    def __init__(self, norm: nn.LayerNorm | nn.RMSNorm) -> None:
        super().__init__()
        (self.width,) = norm.normalized_shape
        self.eps = norm.eps
        self.centred = isinstance(norm, nn.LayerNorm)
        self.weight = norm.weight
        self.bias = norm.bias if isinstance(norm, nn.LayerNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same"""
        rows = x.reshape(-1, self.width).contiguous()
        out = torch.empty_like(rows)
        if len(rows):
            norm_kernels.norm[(len(rows),)](
                rows,
                rows if self.weight is None else self.weight,
                rows if self.bias is None else self.bias,
                out,
                self.eps,
                width=self.width,
                width_pad=next_power_of_2(self.width),
                centred=self.centred,
                has_weight=self.weight is not None,
                has_bias=self.bias is not None,
                emulated=emulates(rows.dtype),
                num_warps=4 if self.width > 256 else 1,
                enable_fp_fusion=False,
            )
        return out.view(x.shape)


class TritonBlock(nn.Module):
    """Block's computation over rows, with its activation and residuals inside the products."""

    def __init__(self, block: Block, activation: Activation, make_product: MakeProduct) -> None:
        super().__init__()
        self.layer = block.layer
        self.parallel = block.parallel
        self.norm1 = serve_norm(block.norm1)
        self.norm2 = serve_norm(block.norm2)
        self.qk_norm = block.qk_norm
        self._qkv = make_product(block.qkv, None)
        self._out = make_product(block.out, None)
        self._up = make_product(block.mlp.up, activation)
        self._down = make_product(block.mlp.down, None)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """[num_rows, hidden_size] -> the same"""
        qkv = self.qk_norm(self._qkv(self.norm1(x)))
        attended = self._out.add_to(x, attention(self.layer, qkv))
        seen = x if self.parallel else attended
        return self._down.add_to(attended, self._up(self.norm2(seen)))


MakeProduct = Callable[[nn.Linear, Activation | None], TritonProduct]


def serve_norm(norm: nn.Module) -> nn.Module:
    """A norm in Triton."""
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    return TritonNorm(norm)


def use_triton(model: GPT2, wide: Sequence[ProductTile] = WIDE_TILES) -> None:
    """Replace blocks, last norm and head of a loaded model, in place; it can no longer be trained.
    Its logits are float32.

    wide: tiles to try for many rows, once for each shape of weight.
    """
    found: dict[tuple[int, int], ProductTile] = {}

    def make_product(
        linear: nn.Linear, activation: Activation | None, out_dtype: torch.dtype | None = None
    ) -> TritonProduct:
        shape = (linear.in_features, linear.out_features)
        if shape not in found:
            found[shape] = TritonProduct(linear, None).find_wide(wide)
        return TritonProduct(linear, activation, found[shape], out_dtype)

    for at, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.qk_norm, QKNorm):
            for name, norm in list(block.qk_norm.named_children()):
                setattr(block.qk_norm, name, serve_norm(norm))
        model.blocks[at] = TritonBlock(block, model.config.activation, make_product)
    model.norm = serve_norm(model.norm)
    # The likeliest logits of a vocabulary lie closer together than bfloat16 can tell.
    make_logits = partial(make_product, out_dtype=torch.float32)
    model.add_module("head", PackedLinear(model.head, None, make_logits))
