"""Log-probabilities in Triton: one program a row, which adds up in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from engine.execution.kernels.sampling import NO_TOKEN, read


@triton.jit
def highest(logits, allowed, value, token, vocab_size: tl.constexpr, block: tl.constexpr):
    """The likeliest of the tokens behind (value, token) in the order of falling logits, equal ones
    in the order of their ids; and its logit."""
    best = tl.full([], float("-inf"), tl.float32)
    first = tl.full([], NO_TOKEN, tl.int32)
    for start in range(0, vocab_size, block):
        x = read(logits, allowed, start, vocab_size, block)
        at = start + tl.arange(0, block)
        behind = (at < vocab_size) & ((x < value) | ((x == value) & (at > token)))
        here = tl.max(tl.where(behind, x, float("-inf")), 0)
        lowest = tl.min(tl.where(behind & (x == here), at, NO_TOKEN), 0)
        better = (here > best) | ((here == best) & (lowest < first))
        first = tl.where(better, lowest, first)
        best = tl.where(better, here, best)
    return best, first


@triton.jit
def logprob(x, best, log_total):
    """The bits of a natural logarithm float32, int32."""
    return (x.to(tl.float64) - best - log_total).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def logprobs(
    logits,
    allowed,
    present,
    num_logprobs,
    sampled,
    logits_stride,
    sampled_stride,
    most: tl.constexpr,
    vocab_size: tl.constexpr,
    block: tl.constexpr,
):
    """Behind each row's token: its log-probability by the model's own logits, then the ids of the
    num_logprobs likeliest tokens and, `most` further, their log-probabilities; floats by their
    bits. Rows that want none (below 0) are passed over. grid (num_rows,)."""
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(num_logprobs + row)
    sampled += row * sampled_stride
    logits += row * logits_stride
    if (tl.load(present + row) == 0) | (wanted < 0):
        return
    token = tl.load(sampled)
    if token < 0:  # there is none
        return
    everything = tl.full([], float("inf"), tl.float32)
    best, first = highest(logits, allowed, everything, -1, vocab_size, block)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab_size, block):
        x = read(logits, allowed, start, vocab_size, block)
        total += tl.sum(tl.exp(x - best).to(tl.float64), 0)
    log_total = tl.log(total)
    best64 = best.to(tl.float64)
    tl.store(sampled + 1, logprob(tl.load(logits + token), best64, log_total))
    value = best
    tl.store(sampled + 2, first, mask=wanted > 0)
    tl.store(sampled + 2 + most, logprob(value, best64, log_total), mask=wanted > 0)
    for at in range(1, wanted):
        value, first = highest(logits, allowed, value, first, vocab_size, block)
        tl.store(sampled + 2 + at, first)
        tl.store(sampled + 2 + most + at, logprob(value, best64, log_total))
