"""From logits to tokens. Each row is a function of its own logits, parameters and random number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.errors import GrammarFailed
from engine.execution.cpu_draw import KernelDraw
from engine.execution.draw import Draw, draw
from engine.execution.masks import GrammarMasks
from engine.messages import SampledToken, TokenLogprobs
from engine.model.library import KernelUnavailableError
from engine.request import Request


class TokenCounts:
    """Which tokens a request has seen, kept up as it grows; for its penalties.

    ids are the distinct ones in the order they came, outputs how often each was generated.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.outputs: list[int] = []
        self._places: dict[int, int] = {}
        self._counted = 0

    def update(self, request: Request) -> None:
        """Count the tokens that came since the last call."""
        for at in range(self._counted, request.num_tokens):
            token_id = request.token_ids[at]
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.outputs.append(0)
            self.outputs[place] += at >= request.num_prompt_tokens
        self._counted = request.num_tokens


def choose_draw() -> Draw:
    """The compiled kernel's, where there is one for this machine."""
    try:
        return KernelDraw()
    except KernelUnavailableError:
        return draw


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
        self._draw = choose_draw()
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
            if has_penalty(request):
                self._penalise(logits[row], request)
        errors = self._obey(logits, requests)
        for row, request in enumerate(requests):
            if changes_logits(request):
                token_ids[row] = int(logits[row].numpy().argmax())
        random = [row for row, request in enumerate(requests) if not request.params.greedy]
        if random:
            drawn = self._draw(logits, random, [requests[row] for row in random])
            for row, token_id in zip(random, drawn, strict=True):
                token_ids[row] = token_id
        sampled = []
        for row, (token_id, request) in enumerate(zip(token_ids, requests, strict=True)):
            told = None
            if row in logprobs:
                values, top = logprobs[row]
                told = TokenLogprobs(float(values[token_id]), top)
            ended, error = False, errors.get(row)
            if self._masks is not None and request.params.grammar is not None and error is None:
                try:
                    ended = self._masks.take(request, token_id)
                except GrammarFailed as fault:
                    error = str(fault)
            sampled.append(SampledToken(token_id, told, ended, error))
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
        return [
            TokenLogprobs(logprob, _likeliest(own, row, top))
            for logprob, own, row in zip(taken.tolist(), logits, logprobs, strict=True)
        ]

    def _checked(self, logits: Tensor) -> tuple[Tensor, list[int]]:
        """The logits of real tokens, in place, ids that no token has being impossible; and the
        likeliest of each row."""
        logits = logits[:, : self._vocab_size]
        if len(self._unused):
            logits.index_fill_(1, self._unused, -torch.inf)
        rows = logits.numpy()  # its argmax is many times as fast as torch's
        token_ids = [int(row.argmax()) for row in rows]  # of equals the first; a NaN is the highest
        if not np.isfinite(rows[range(len(rows)), token_ids]).all():
            raise FloatingPointError("the model's logits are not finite")
        return logits, token_ids

    @staticmethod
    def _model_logprobs(
        logits: Tensor, requests: Sequence[Request]
    ) -> dict[int, tuple[Tensor, list[tuple[int, float]]]]:
        """Of the rows that ask for them: log-probabilities [vocab_size], and the likeliest."""
        wanted = {
            row: request.params.logprobs
            for row, request in enumerate(requests)
            if request.params.logprobs is not None
        }
        if not wanted:
            return {}
        logprobs = logits[list(wanted)].log_softmax(dim=-1)
        return {
            row: (each, _likeliest(logits[row], each, count))
            for (row, count), each in zip(wanted.items(), logprobs, strict=True)
        }

    def _penalise(self, logits: Tensor, request: Request) -> None:
        """Apply the penalties to one row, in place."""
        params = request.params
        counts = self._counts.setdefault(request.request_id, TokenCounts())
        counts.update(request)
        row, ids = logits.numpy(), np.array(counts.ids)
        ids, outputs = ids[ids < len(row)], np.array(counts.outputs, np.float32)[ids < len(row)]
        seen, factor = row[ids], np.float32(params.repetition_penalty)
        seen = np.where(seen > 0, seen / factor, seen * factor)
        seen -= np.float32(params.frequency_penalty) * outputs
        seen -= np.float32(params.presence_penalty) * (outputs > 0)
        row[ids] = seen


def _likeliest(logits: Tensor, logprobs: Tensor, count: int) -> list[tuple[int, float]]:
    """Ids and log-probabilities of the `count` likeliest tokens of a row, likeliest first; equal
    logits in the order of their ids."""
    count = min(count, len(logits))
    if count == 0:
        return []
    row = logits.numpy()
    ids = np.flatnonzero(row >= float(logits.topk(count).values[-1]))
    ids = ids[np.argsort(-row[ids], kind="stable")][:count]
    return list(zip(ids.tolist(), logprobs.numpy()[ids].tolist(), strict=True))


def _add_biases(logits: Tensor, biases: Mapping[int, float]) -> None:
    """Add to one row [vocab_size], in place; a token that cannot be sampled stays so."""
    ids = torch.tensor(list(biases), dtype=torch.int64)
    logits[ids] += torch.tensor(list(biases.values()), dtype=torch.float32)


def changes_logits(request: Request) -> bool:
    """Whether the likeliest token may be another one than the model's."""
    params = request.params
    return has_penalty(request) or bool(params.logit_bias) or params.grammar is not None


def has_penalty(request: Request) -> bool:
    """Whether tokens that were seen count."""
    params = request.params
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )
