"""Cross-entropy of a language model's head without ever holding all logits.

4,096 tokens x 8,192 ids x float32 are 134 MB, read and written several times a step: on a CPU, more
time than the rest of a small network takes. A few hundred rows at a time stay in its cache, and
their gradients are computed at once, so that nothing has to be kept or computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 256  # 256 x 8,192 float32 logits are 8 MiB
_SMALLEST = torch.finfo(torch.float32).tiny  # a probability that underflowed still has a logarithm


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        hidden_grad = torch.empty_like(rows)
        weight_grad = torch.zeros_like(weight)
        total = torch.zeros((), dtype=torch.float64, device=rows.device)
        for start in range(0, rows.shape[0], _ROWS):
            part = slice(start, start + _ROWS)
            # One softmax gives both: loss = -log p[target], d loss / d logits = p - one-hot. (It is
            # also several times faster than exp() of a tensor, which a CPU's MKL may do slowly.)
            slope = (rows[part] @ matrix.T).softmax(dim=1, dtype=torch.float32)
            wanted = targets[part, None]
            chosen = slope.gather(1, wanted)
            total -= chosen.clamp_min(_SMALLEST).log().sum()
            slope = slope.scatter_(1, wanted, chosen - 1).to(dtype)
            hidden_grad[part] = slope @ matrix
            weight_grad += slope.T @ rows[part]
        count = targets.numel()
        ctx.save_for_backward(hidden_grad.div_(count), weight_grad.div_(count))
        ctx.hidden_dtype = hidden.dtype
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (hidden_grad * grads[0]).to(ctx.hidden_dtype), weight_grad * grads[0], None, None


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean cross-entropy in nats per token; products in dtype, the softmax in float32.

    hidden [..., hidden_size], weight [vocabulary, hidden_size] float32, targets [...] int64.
    """
    loss: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]  # torch has no types here
        hidden.flatten(0, -2), weight, targets.flatten(), dtype
    )
    return loss


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token, float32 [tokens]; hidden [tokens, hidden_size], whose dtype computes."""
    matrix = weight.to(hidden.dtype)
    losses = [
        F.cross_entropy(
            (hidden[start : start + _ROWS] @ matrix.T).float(),
            targets[start : start + _ROWS],
            reduction="none",
        )
        for start in range(0, len(targets), _ROWS)
    ]
    return torch.cat(losses)
