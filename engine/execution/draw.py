"""Temperature, filters, and a token by the inverse of the cumulative distribution, in torch.

cpu_draw.cpp does the same, faster; this serves where it was not compiled.

Every operation over several rows is one whose result for a row cannot depend on the others: exact
(comparison, division, maximum), or done row by row inside (softmax, cumulative sum).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.execution.uniforms import uniforms
from engine.request import Request

NUCLEUS_TOKENS = 512
"""Tokens that a nucleus (top_p) is first looked for among: sorting a vocabulary is slow."""

Draw = Callable[[Tensor, Sequence[int], Sequence[Request]], Sequence[int]]
"""Logits float32 [rows, vocab_size], the rows to draw from, the request of each -> their tokens."""


def draw(logits: Tensor, rows: Sequence[int], requests: Sequence[Request]) -> list[int]:
    """Draw by torch, in order of token id. See Draw."""
    probabilities = filtered(logits[list(rows)], requests)
    cumulative = probabilities.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.from_numpy(uniforms(requests))[:, None] * total
    # Rounding must not reach the total, beyond which there is no token.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    drawn: list[int] = torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()
    return drawn


def filtered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Probabilities [rows, vocab_size] after temperature and filters; not normalised again.

    A filter keeps tokens down to a threshold, so ties stay together.
    """
    params = [request.params for request in requests]
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float32)
    # The largest goes to zero first: a tiny temperature then cannot overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature[:, None]
    for row, p in enumerate(params):
        if 0 < p.top_k < scaled.shape[1]:
            threshold = scaled[row].topk(p.top_k).values[-1]
            scaled[row].masked_fill_(scaled[row] < threshold, -torch.inf)
    probabilities = scaled.softmax(dim=-1)
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1]
    if nucleus:
        enough = torch.tensor([params[row].top_p for row in nucleus], dtype=torch.float64)
        threshold = nucleus_threshold(probabilities[nucleus], enough)
        kept = probabilities[nucleus]
        probabilities[nucleus] = kept.masked_fill_(kept < threshold, 0.0)
    floor = torch.tensor([p.min_p for p in params], dtype=torch.float32)[:, None]
    floor = floor * probabilities.amax(dim=-1, keepdim=True)
    return probabilities.masked_fill_(probabilities < floor, 0.0)


def nucleus_threshold(probabilities: Tensor, enough: Tensor) -> Tensor:
    """The least probability [rows, 1] that the likeliest tokens need to reach `enough` [rows].

    Most nuclei are small: the likeliest tokens are looked at first, all of them only where these do
    not reach it. Both give the same number.
    """
    size = probabilities.shape[1]
    for count in (min(NUCLEUS_TOKENS, size), size):
        ordered = probabilities.topk(count).values
        mass = ordered.double().cumsum(dim=-1)
        if count == size or (mass[:, -1] >= enough).all():
            break
    last = (mass < enough[:, None]).sum(dim=-1, keepdim=True)
    return ordered.gather(1, last.clamp_(max=count - 1))
