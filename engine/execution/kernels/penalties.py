"""Biases and penalties in Triton, and the counts of tokens that penalties need.

The rules and the order of `engine.execution.sampler.Sampler`, in float32: biases first, then the
penalties of tokens that a row has seen. Rows with neither are passed over.
"""

from __future__ import annotations

import triton
import triton.language as tl

BIASES = tl.constexpr(128)
"""Biases that a program applies at once."""


@triton.jit
def is_penalised(penalties, row):
    """Whether a row has a penalty. penalties [num_rows, 3]: repetition, frequency, presence."""
    repetition = tl.load(penalties + row * 3)
    frequency = tl.load(penalties + row * 3 + 1)
    presence = tl.load(penalties + row * 3 + 2)
    return (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)


@triton.jit
def is_adjusted(present, penalties, num_biases, row):
    """Whether somebody is in a row whose logits are not the model's."""
    changes = is_penalised(penalties, row) | (tl.load(num_biases + row) > 0)
    return (tl.load(present + row) != 0) & changes


@triton.jit
def penalised(x, counts, mask, penalties, row):
    """Logits float32 [n] after the penalties. counts: pointers [n]; see SamplingTensors."""
    count = tl.load(counts, mask=mask, other=0)
    outputs = (count >> 1).to(tl.float32)
    repetition = tl.load(penalties + row * 3) + outputs * 0.0  # div_rn wants a tensor
    y = tl.where(x > 0.0, tl.math.div_rn(x, repetition), x * repetition)
    y -= tl.load(penalties + row * 3 + 1) * outputs
    y -= tl.load(penalties + row * 3 + 2) * (outputs > 0.0).to(tl.float32)
    return tl.where(count > 0, y, x)


@triton.jit(do_not_specialize=["bias_stride"])
def adjust(
    logits,
    adjusted,
    present,
    penalties,
    counts,
    num_biases,
    bias_ids,
    bias_values,
    logits_stride,
    bias_stride,
    counts_width: tl.constexpr,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """Logits of the rows that have biases or penalties -> adjusted, both float32 with the same
    stride; what the other rows have there is left. grid (num_rows, vocab_size / block)."""
    row = tl.program_id(0).to(tl.int64)
    if is_adjusted(present, penalties, num_biases, row) == 0:
        return
    has_penalty = is_penalised(penalties, row)
    biases = tl.load(num_biases + row)
    logits += row * logits_stride
    adjusted += row * logits_stride
    counts += row * counts_width
    start = tl.program_id(1) * block
    at = start + tl.arange(0, block)
    inside = at < vocab_size
    x = tl.load(logits + at, mask=inside, other=0.0)
    if has_penalty:
        x = penalised(x, counts + at, inside, penalties, row)
    tl.store(adjusted + at, x, mask=inside)
    if biases > 0:
        tl.debug_barrier()  # the few with a bias are written once more, by other threads
        for first in range(0, biases, BIASES):
            number = first + tl.arange(0, BIASES)
            place = row * bias_stride + number
            token = tl.load(bias_ids + place, mask=number < biases, other=-1)
            here = (token >= start) & (token < start + block)
            biased = tl.load(logits + token, mask=here, other=0.0)
            biased += tl.load(bias_values + place, mask=here, other=0.0)
            if has_penalty:
                biased = penalised(biased, counts + token, here, penalties, row)
            tl.store(adjusted + token, biased, mask=here)


@triton.jit
def count_token(counts, token, penalties, row, mask, counts_width: tl.constexpr):
    """One more of a token in a row's output, where the row has a penalty."""
    mask = mask & is_penalised(penalties, row)
    place = counts + row.to(tl.int64) * counts_width + token
    tl.store(place, tl.load(place, mask=mask, other=0) + 2, mask=mask)
