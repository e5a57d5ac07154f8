"""Carries out a step: the network over its inputs, the sampler behind it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.execution.inputs import InputBatch, Inputs
from engine.execution.sampler import Sampler
from engine.execution.transfer import upload
from engine.messages import ScheduledRequest, SchedulerOutput, StepResult, TokenLogprobs
from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.gpt2 import GPT2

SCORED_ROWS = 128
"""Rows of logits that are kept at once for scoring: a row is as long as the vocabulary."""


class Runner(Protocol):
    """Executes SchedulerOutputs, one after the other."""

    looks_ahead: bool
    """Whether it begins a step before the scheduler has asked for it, where there are pages."""

    @property
    def name(self) -> str:
        """How, as a line for people; empty for the plain way."""
        ...

    @property
    def ahead(self) -> Collection[str]:
        """The requests whose next token is being computed already."""
        ...

    def warm_up(self, num_rows: Sequence[int]) -> None:
        """Do what is slow the first time, for steps of so many rows."""
        ...

    def execute(self, step: SchedulerOutput) -> StepResult:
        """Compute the step's tokens, sample behind the last known ones, score what is to be."""
        ...


class ModelRunner:
    """A step from its inputs to its tokens: the host waits for the network and samples."""

    name = ""
    looks_ahead = False
    ahead: Collection[str] = ()

    def __init__(
        self,
        model: GPT2,
        backend: AttentionBackend,
        sampler: Sampler,
        batch: InputBatch,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self._backend = backend
        self._batch = batch
        self._inputs = Inputs(batch, backend)
        self._block_size = backend.cache.block_size
        self._device = backend.cache.keys[0].device

    def begin(self, step: SchedulerOutput) -> None:
        """Forget what is released, and put the rotations that the step needs."""
        self._batch.release(step.released)
        for request_id in step.released:
            self.sampler.forget(request_id)
        for each in step.profiles:
            self._backend.put_profile(each.row, each.scaling, each.num_positions)

    def execute(self, step: SchedulerOutput) -> StepResult:
        """See Runner."""
        self.begin(step)
        if not step.scheduled:
            return StepResult([])
        requests = [item.request for item in step.scheduled if item.samples]
        self.sampler.prepare(requests)
        with torch.inference_mode():
            hidden, last = self.forward(step.scheduled)
            scores = self.scores(step.scheduled, hidden)
            if not requests:
                return StepResult([], scores)
            logits = self.model.logits(hidden[last]).float().cpu()
            return StepResult(self.sampler.sample(logits, requests), scores)

    def forward(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, Tensor]:
        """Hidden states of all their rows, in order, and the numbers of the rows behind which a
        token is sampled."""
        inputs = self._inputs.of(scheduled)
        return self.model(inputs.token_ids, inputs.attention), inputs.last

    def scores(
        self, scheduled: Sequence[ScheduledRequest], hidden: Tensor
    ) -> dict[str, list[TokenLogprobs]]:
        """The targets behind the tokens of this step, by request id."""
        scores: dict[str, list[TokenLogprobs]] = {}
        begin = 0  # the item's first row
        for item in scheduled:
            for row, token_ids in _targets(item, SCORED_ROWS):
                rows = hidden[begin + row : begin + row + len(token_ids)]
                logits = self.model.logits(rows).float().cpu()
                scores.setdefault(item.request.request_id, []).extend(
                    self.sampler.score(logits, token_ids, item.request.params.logprobs or 0)
                )
            begin += item.num_tokens
        return scores

    def warm_up(self, num_rows: Sequence[int]) -> None:
        """Run the network once for each number of rows, so that no request pays for first calls.

        It writes to block 0, which must be free, by profile 0, which must have been put.
        """
        for rows in num_rows:
            count = min(rows, self._block_size, self.model.config.max_position)
            token_ids, *where = upload(
                [
                    np.zeros(count, np.int64),
                    np.array([0, count], np.int32),
                    np.arange(count, dtype=np.int32),
                    np.arange(count, dtype=np.int64),
                    np.zeros((1, 1), np.int32),
                    np.zeros((1, 1), np.int32),
                    np.ones(1, np.int32),
                    np.zeros(1, np.int32),
                ],
                self._device,
            )
            with torch.inference_mode():
                attention = self._backend.bind(AttentionMetadata(*where))
                self.model.logits(self.model(token_ids, attention))


def _targets(item: ScheduledRequest, most: int) -> Iterator[tuple[int, list[int]]]:
    """(row in the item, tokens wanted behind it and the next rows), at most so many at a time."""
    targets, row = item.request.targets, item.request.next_scored
    if targets is None or row is None:
        return
    end = min(item.start + item.num_tokens, targets.first + len(targets.token_ids))
    for at in range(row, end, most):
        wanted = slice(at - targets.first, min(at + most, end) - targets.first)
        yield at - item.start, targets.token_ids[wanted]
