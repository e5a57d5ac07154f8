"""Sampling in Triton: one program a row, so a row's token does not depend on the batch.

The same rules as `engine.execution.sampler.Sampler`: temperature, top-k, top-p, min-p, ties stay
together; then the cumulative distribution in order of token id is inverted at a number that Philox
gives for (seed, stream index, choice). Nothing is sorted: a filter is a threshold, found by halving
the range of float32's bits 31 times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engine.execution.kernels.penalties import is_adjusted

NO_TOKEN = tl.constexpr(2**31 - 1)
NOT_FINITE = tl.constexpr(-1)
"""What stands for a token where the logits are NaN or infinite."""

BITS = tl.constexpr(31)
INFINITY_BITS = tl.constexpr(0x7F800000)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def uniform(seed, index, choice):
    """A float64 in [0, 1) from Philox4x32-10: 53 bits, 27 of one word and 26 of another."""
    zero = choice * 0
    first, second, _, _ = tl.philox(seed, index, choice, zero, zero)
    high = (first.to(tl.uint32, bitcast=True) >> 5).to(tl.float64)
    low = (second.to(tl.uint32, bitcast=True) >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * 1.1102230246251565e-16


@triton.jit
def read(logits, allowed, start, vocab_size: tl.constexpr, block: tl.constexpr):
    """float32 [block] of a row; -inf for ids that are never sampled."""
    at = start + tl.arange(0, block)
    inside = at < vocab_size
    x = tl.load(logits + at, mask=inside, other=float("-inf")).to(tl.float32)
    usable = tl.load(allowed + at, mask=inside, other=0) != 0
    return tl.where(usable, x, float("-inf"))


@triton.jit
def below(logits, allowed, start, best, temperature, vocab_size: tl.constexpr, block: tl.constexpr):
    """How far tokens are below the likeliest, by temperature: float32 >= 0, whose bits have the
    order of the numbers, int32."""
    x = read(logits, allowed, start, vocab_size, block)
    distance = tl.math.div_rn(best - x, tl.full([block], 1.0, tl.float32) * temperature)
    return distance, distance.to(tl.int32, bitcast=True)


@triton.jit
def weight(distance, bits, limit):
    """Relative probability, float64; 0 beyond a limit."""
    return tl.where(bits <= limit, tl.exp2(-distance * LOG2_E), 0.0).to(tl.float64)


@triton.jit
def limit_by_number(
    logits,
    allowed,
    best,
    temperature,
    top_k,
    limit,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """The least bits such that top_k tokens are within them."""
    low = tl.full([], 0, tl.int32)
    for _ in range(BITS):
        middle = low + (limit - low) // 2
        count = tl.full([], 0, tl.int32)
        for start in range(0, vocab_size, block):
            _distance, bits = below(logits, allowed, start, best, temperature, vocab_size, block)
            count += tl.sum((bits <= middle).to(tl.int32), 0)
        enough = count >= top_k
        limit = tl.where(enough, middle, limit)
        low = tl.where(enough, low, tl.minimum(middle + 1, limit))
    return limit


@triton.jit
def mass_within(
    logits,
    allowed,
    best,
    temperature,
    limit,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """The sum of the weights up to a limit, float64."""
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab_size, block):
        distance, bits = below(logits, allowed, start, best, temperature, vocab_size, block)
        mass += tl.sum(weight(distance, bits, limit), 0)
    return mass


@triton.jit
def limit_by_mass(
    logits,
    allowed,
    best,
    temperature,
    top_p,
    limit,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """The least bits such that the tokens within them have top_p of the mass within the limit."""
    needed = top_p * mass_within(logits, allowed, best, temperature, limit, vocab_size, block)
    low = tl.full([], 0, tl.int32)
    for _ in range(BITS):
        middle = low + (limit - low) // 2
        mass = mass_within(logits, allowed, best, temperature, middle, vocab_size, block)
        enough = mass >= needed
        limit = tl.where(enough, middle, limit)
        low = tl.where(enough, low, tl.minimum(middle + 1, limit))
    return limit


@triton.jit
def sample(
    logits,
    adjusted,
    allowed,
    present,
    penalties,
    num_biases,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    indices,
    choices,
    sampled,
    logits_stride,
    sampled_stride,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """A token for each row that is present, int32; NOT_FINITE where there is none. Rows with
    biases or penalties are read from `adjusted`. grid (num_rows,)."""
    row = tl.program_id(0)
    if tl.load(present + row) == 0:
        return
    to = sampled + row * sampled_stride
    logits = tl.where(is_adjusted(present, penalties, num_biases, row), adjusted, logits)
    logits += row.to(tl.int64) * logits_stride
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], NO_TOKEN, tl.int32)
    wrong = tl.full([], 0, tl.int32)
    for start in range(0, vocab_size, block):
        x = read(logits, allowed, start, vocab_size, block)
        at = start + tl.arange(0, block)
        nan_or_infinite = (x != x) | (x == float("inf"))  # noqa: PLR0124  # Triton has no isnan
        wrong = tl.maximum(wrong, tl.max(nan_or_infinite.to(tl.int32), 0))
        highest = tl.max(x, 0)
        first = tl.min(tl.where(x == highest, at, NO_TOKEN), 0)
        token = tl.where(highest > best, first, token)
        best = tl.maximum(best, highest)
    if (wrong != 0) | (best == float("-inf")):
        tl.store(to, NOT_FINITE)
        return
    temperature = tl.load(temperatures + row)
    if temperature == 0.0:
        tl.store(to, token)
        return

    limit = tl.full([], INFINITY_BITS - 1, tl.int32)
    top_k = tl.load(top_ks + row)
    if (top_k > 0) & (top_k < vocab_size):
        limit = limit_by_number(logits, allowed, best, temperature, top_k, limit, vocab_size, block)
    top_p = tl.load(top_ps + row)
    if top_p < 1.0:
        limit = limit_by_mass(logits, allowed, best, temperature, top_p, limit, vocab_size, block)

    # The likeliest token's weight is 1, so min-p needs no maximum.
    min_p = tl.load(min_ps + row).to(tl.float64)
    mass = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab_size, block):
        distance, bits = below(logits, allowed, start, best, temperature, vocab_size, block)
        each = weight(distance, bits, limit)
        mass += tl.sum(tl.where(each >= min_p, each, 0.0), 0)
    number = uniform(tl.load(seeds + row), tl.load(indices + row), tl.load(choices + row))
    target = number * mass
    mass = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], NO_TOKEN, tl.int32)
    last = token
    for start in range(0, vocab_size, block):
        distance, bits = below(logits, allowed, start, best, temperature, vocab_size, block)
        each = weight(distance, bits, limit)
        each = tl.where(each >= min_p, each, 0.0)
        at = start + tl.arange(0, block)
        over = (mass + tl.cumsum(each, 0) > target) & (each > 0.0)
        chosen = tl.minimum(chosen, tl.min(tl.where(over, at, NO_TOKEN), 0))
        last = tl.maximum(last, tl.max(tl.where(each > 0.0, at, 0), 0))
        mass += tl.sum(each, 0)
    # Rounding may leave the target beyond the last sum: then it is the last token that counts.
    tl.store(to, tl.where(chosen == NO_TOKEN, last, chosen))
