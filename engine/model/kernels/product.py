"""Weight products in Triton, with bias, activation and residual; rows do not depend on the batch.

Every element is one chain of sums over in_features in ascending order, whatever the tile; there is
no split over them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.model.kernels.common import loaded, rounded


@triton.jit
def activated(x, activation: tl.constexpr):
    """float32 -> float32."""
    if activation == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif activation == "gelu_tanh":
        angle = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        # 2 log2(e): tanh(a) = 1 - 2 / (exp(2a) + 1), which is right at both ends
        power = tl.exp2(tl.minimum(angle * 2.8853900817779268, 126.0))  # beyond it tanh is 1
        x = x * (1.0 - tl.math.div_rn(1.0, power + 1.0))
    elif activation == "relu":
        x = tl.maximum(x, 0.0)
    elif activation == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    return x


@triton.jit(do_not_specialize=["num_rows"])
def product(
    rows,
    weight,
    bias,
    residual,
    out,
    num_rows,
    in_features: tl.constexpr,
    out_features: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    activation: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    tile_in: tl.constexpr,
    emulated: tl.constexpr,
):
    """residual + activation(rows weight^T + bias): rows [num_rows, in_features], weight
    [out_features, in_features], residual and out [num_rows, out_features], all contiguous.

    grid (num_rows / tile_rows, out_features / tile_out), rounded up.
    """
    row = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)
    column = (tl.program_id(1) * tile_out + tl.arange(0, tile_out)).to(tl.int64)
    live = row < num_rows
    inside = column < out_features
    feature = tl.arange(0, tile_in)
    from_rows = rows + row[:, None] * in_features
    from_weight = weight + column[:, None] * in_features
    total = tl.zeros([tile_rows, tile_out], tl.float32)
    for start in range(0, in_features, tile_in):
        at = (start + feature)[None, :]
        there = at < in_features
        x = tl.load(from_rows + at, mask=live[:, None] & there, other=0.0)
        w = tl.load(from_weight + at, mask=inside[:, None] & there, other=0.0)
        x, w = loaded(x, emulated), loaded(w, emulated)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    if has_bias:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = activated(total, activation)
    place = row[:, None] * out_features + column[None, :]
    mask = live[:, None] & inside[None, :]
    if has_residual:
        total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, rounded(total, out.dtype.element_ty, emulated), mask=mask)
