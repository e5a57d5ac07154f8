"""From logits to tokens. Each row is a function of its own logits, parameters and random number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import GrammarFailed
from engine.execution.masks import GrammarMasks
from engine.messages import SampledToken, TokenLogprobs
from engine.request import Request

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)

NUCLEUS_TOKENS = 512
"""Tokens that a nucleus (top_p) is first looked for among: sorting a vocabulary is slow."""

Words = NDArray[np.uint64]


def philox(counter: Words, key: Words) -> Words:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter [4, n] and key [2, n] hold 32-bit words in uint64; returns [4, n] of the same kind.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high, low = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (low >> _WORD) ^ c1 ^ k0,
            low & _LOW,
            (high >> _WORD) ^ c3 ^ k1,
            high & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(requests: Sequence[Request]) -> NDArray[np.float64]:
    """One number in [0, 1) per request, a function of (seed, choice, stream index) alone."""
    counter = np.zeros((4, len(requests)), np.uint64)
    counter[0] = [request.num_output_tokens for request in requests]
    counter[1] = [request.choice for request in requests]
    seeds = np.array([request.seed for request in requests], np.uint64)
    words = philox(counter, np.stack((seeds & _LOW, seeds >> _WORD)))
    # 53 bits, as a double holds: 27 from one word and 26 from another.
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * np.float64(2**26) + low) / np.float64(2**53)
    return numbers


class TokenCounts:
    """Which tokens a request has seen, kept up as it grows; for its penalties."""

    def __init__(self, vocab_size: int) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool)
        self.output = torch.zeros(vocab_size, dtype=torch.float32)
        self._counted = 0

    def update(self, request: Request) -> None:
        """Count the tokens that came since the last call."""
        for at in range(self._counted, request.num_tokens):
            token_id = request.token_ids[at]
            self.seen[token_id] = True
            if at >= request.num_prompt_tokens:
                self.output[token_id] += 1
        self._counted = request.num_tokens


class Sampler:
    """Chooses the next token of each request.

    Every operation over several rows is one whose result for a row cannot depend on the others:
    exact (comparison, division, maximum), or done row by row inside (softmax, cumulative sum).
    """

    def __init__(
        self,
        vocab_size: int,
        unused_token_ids: Sequence[int] = (),
        masks: GrammarMasks | None = None,
    ) -> None:
        """vocab_size: ids at or above it are never sampled, nor are the unused ones. masks: for
        requests with a grammar, which admission lets in only where there are some."""
        self._vocab_size = vocab_size
        self._masks = masks
        self._unused = torch.tensor(unused_token_ids, dtype=torch.int64)
        self._counts: dict[str, TokenCounts] = {}

    def forget(self, request_id: str) -> None:
        """Drop what was kept for a request."""
        self._counts.pop(request_id, None)
        if self._masks is not None:
            self._masks.forget(request_id)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Begin in another thread what sample() will need; called before the network runs."""
        if self._masks is not None:
            self._masks.prepare(requests)

    def sample(self, logits: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """Logits float32 [len(requests), >= vocab_size], overwritten -> one token each.

        Raises FloatingPointError where a row has NaN or infinity: no token would be right.
        """
        logits, token_ids = self._checked(logits)
        logprobs = self._model_logprobs(logits, requests)
        for row, request in enumerate(requests):
            if request.params.logit_bias:
                _add_biases(logits[row], request.params.logit_bias)
            if _has_penalty(request):
                self._penalise(logits[row], request)
        errors = self._obey(logits, requests)
        for row, request in enumerate(requests):
            if changes_logits(request):
                token_ids[row] = logits[row].argmax()
        random = [row for row, request in enumerate(requests) if not request.params.greedy]
        if random:
            chosen = self._draw(logits[random], [requests[row] for row in random])
            token_ids[random] = chosen
        sampled = []
        for row, (token_id, request) in enumerate(zip(token_ids.tolist(), requests, strict=True)):
            top = self._top(logprobs.get(row), token_id, request)
            ended, error = False, errors.get(row)
            if self._masks is not None and request.params.grammar is not None and error is None:
                try:
                    ended = self._masks.take(request, token_id)
                except GrammarFailed as fault:
                    error = str(fault)
            sampled.append(SampledToken(token_id, top, ended, error))
        return sampled

    def _obey(self, logits: Tensor, requests: Sequence[Request]) -> dict[int, str]:
        """Forbid, in place, what the rows' grammars forbid; the rows for which that is impossible,
        with the reason."""
        errors = {}
        for row, request in enumerate(requests):
            if self._masks is not None and request.params.grammar is not None:
                try:
                    self._masks.apply(logits[row], request)
                except GrammarFailed as fault:
                    errors[row] = str(fault)
        return errors

    def score(self, logits: Tensor, token_ids: Sequence[int], top: int) -> list[TokenLogprobs]:
        """Logits float32 [len(token_ids), >= vocab_size], overwritten -> what each token has in its
        row, and the `top` likeliest. Raises FloatingPointError as above."""
        logits, _ = self._checked(logits)
        logprobs = logits.log_softmax(dim=-1)
        taken = logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        values, ids = logprobs.topk(min(top, self._vocab_size), dim=-1)
        return [
            TokenLogprobs(logprob, list(zip(*pair, strict=True)))
            for logprob, pair in zip(
                taken.tolist(), zip(ids.tolist(), values.tolist(), strict=True), strict=True
            )
        ]

    def _checked(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of real tokens, in place, ids that no token has being impossible; and the
        likeliest of each row."""
        logits = logits[:, : self._vocab_size]
        if len(self._unused):
            logits.index_fill_(1, self._unused, -torch.inf)
        highest, token_ids = logits.max(dim=-1)  # of equals the first; a NaN is the highest
        if not highest.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        return logits, token_ids

    @staticmethod
    def _model_logprobs(logits: Tensor, requests: Sequence[Request]) -> dict[int, Tensor]:
        """Log-probabilities [vocab_size] of the rows that ask for them."""
        rows = [row for row, request in enumerate(requests) if request.params.logprobs is not None]
        if not rows:
            return {}
        return dict(zip(rows, logits[rows].log_softmax(dim=-1), strict=True))

    @staticmethod
    def _top(logprobs: Tensor | None, token_id: int, request: Request) -> TokenLogprobs | None:
        if logprobs is None or request.params.logprobs is None:
            return None
        values, ids = logprobs.topk(min(request.params.logprobs, len(logprobs)))
        top = list(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprobs(float(logprobs[token_id]), top)

    def _penalise(self, logits: Tensor, request: Request) -> None:
        """Apply the penalties to one row, in place."""
        params = request.params
        counts = self._counts.setdefault(request.request_id, TokenCounts(self._vocab_size))
        counts.update(request)
        factor = params.repetition_penalty
        repeated = torch.where(logits > 0, logits / factor, logits * factor)
        torch.where(counts.seen, repeated, logits, out=logits)
        logits -= params.frequency_penalty * counts.output
        logits -= params.presence_penalty * (counts.output > 0)

    def _draw(self, logits: Tensor, requests: Sequence[Request]) -> Tensor:
        """Sample rows by inverting the cumulative distribution in order of token id."""
        probabilities = self._filtered(logits, requests)
        cumulative = probabilities.double().cumsum(dim=-1)
        total = cumulative[:, -1:]
        target = torch.from_numpy(uniforms(requests))[:, None] * total
        # Rounding must not reach the total, beyond which there is no token.
        target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
        return torch.searchsorted(cumulative, target, right=True)[:, 0]

    @staticmethod
    def _filtered(logits: Tensor, requests: Sequence[Request]) -> Tensor:
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


def _add_biases(logits: Tensor, biases: Mapping[int, float]) -> None:
    """Add to one row [vocab_size], in place; a token that cannot be sampled stays so."""
    ids = torch.tensor(list(biases), dtype=torch.int64)
    logits[ids] += torch.tensor(list(biases.values()), dtype=torch.float32)


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


def changes_logits(request: Request) -> bool:
    """Whether the likeliest token may be another one than the model's."""
    params = request.params
    return _has_penalty(request) or bool(params.logit_bias) or params.grammar is not None


def _has_penalty(request: Request) -> bool:
    params = request.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
