"""LayerNorm and RMSNorm in Triton, one program a row: its bits do not depend on the batch."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.model.kernels.common import rounded


@triton.jit
def norm(
    rows,
    weight,
    bias,
    out,
    eps,
    width: tl.constexpr,
    width_pad: tl.constexpr,
    centred: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    emulated: tl.constexpr,
):
    """Normalise rows [num_rows, width], contiguous, in float32. grid (num_rows,).

    centred: LayerNorm, which takes the mean away; else RMSNorm.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width_pad)
    inside = at < width
    x = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if centred:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    variance = tl.sum(x * x, 0) / width
    x = tl.math.div_rn(x, tl.math.sqrt_rn(variance + eps))
    if has_weight:
        x = x * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    if has_bias:
        x = x + tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, rounded(x, out.dtype.element_ty, emulated), mask=inside)
