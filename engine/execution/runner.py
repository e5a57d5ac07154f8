"""Carries out a step: batch tensors, the pages, the network, the sampler."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.sampler import Sampler
from engine.execution.transfer import upload
from engine.messages import ScheduledRequest, SchedulerOutput, StepResult, TokenLogprobs
from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.gpt2 import GPT2
from engine.request import Request

SCORED_ROWS = 128
"""Rows of logits that are kept at once for scoring: a row is as long as the vocabulary."""


class InputBatch:
    """The block tables of the running requests, kept between steps, one row each.

    A row is extended by what its request gained since the last step, so that a step's work does not
    grow with the context; where the request dropped a page, it is written anew.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        """max_blocks: blocks of most requests; the tables widen for longer ones."""
        self.block_tables: NDArray[np.int32] = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.bases: NDArray[np.int32] = np.zeros((max_num_seqs, max_blocks), np.int32)
        self.num_blocks: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)
        self.profiles: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)
        self._dropped: NDArray[np.int32] = np.zeros(max_num_seqs, np.int32)
        self._rows: dict[str, int] = {}
        self._free = list(range(max_num_seqs))

    def release(self, request_ids: Iterable[str]) -> None:
        """Give the rows of finished, aborted and preempted requests back."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._free.append(row)

    def row(self, request: Request) -> int:
        """The request's row, brought up to date."""
        row = self._rows.get(request.request_id)
        if row is None:
            row = self._rows[request.request_id] = self._free.pop()
            self.num_blocks[row] = 0
            self.profiles[row] = request.profile
        if self._dropped[row] != request.num_dropped_blocks:
            self._dropped[row] = request.num_dropped_blocks
            self.num_blocks[row] = 0
        known, total = self.num_blocks[row], len(request.block_table)
        if known < total:
            if total > self.block_tables.shape[1]:
                self._widen(total)
            self.block_tables[row, known:total] = request.block_table[known:]
            self.bases[row, known:total] = request.bases[known:]
            self.num_blocks[row] = total
        return row

    def _widen(self, num_blocks: int) -> None:
        more = max(num_blocks, 2 * self.block_tables.shape[1]) - self.block_tables.shape[1]
        self.block_tables = np.pad(self.block_tables, ((0, 0), (0, more)))
        self.bases = np.pad(self.bases, ((0, 0), (0, more)))


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
        token_ids, last, metadata = self._inputs(scheduled)
        return self.model(token_ids, self._backend.bind(metadata)), last

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

    def _inputs(
        self, scheduled: Sequence[ScheduledRequest]
    ) -> tuple[Tensor, Tensor, AttentionMetadata]:
        known: list[int] = []
        for item in scheduled:
            known += item.request.token_ids[item.start : item.start + item.num_tokens]
        rows = np.array([self._batch.row(item.request) for item in scheduled])
        starts = np.array([item.position for item in scheduled])
        counts = np.array([item.num_tokens for item in scheduled])
        query_start = np.zeros(len(scheduled) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_rows = int(query_start[-1])
        positions = np.arange(num_rows) + np.repeat(starts - query_start[:-1], counts)
        blocks = self._batch.block_tables[np.repeat(rows, counts), positions // self._block_size]
        slots = blocks.astype(np.int64) * self._block_size + positions % self._block_size
        widest = int(self._batch.num_blocks[rows].max())
        sampling = [at + 1 for at, item in enumerate(scheduled) if item.samples]
        token_ids, last, *where = upload(
            [
                np.array(known, np.int64),
                query_start[sampling].astype(np.int64) - 1,
                query_start,
                positions.astype(np.int32),
                slots,
                self._batch.block_tables[rows, :widest],
                self._batch.bases[rows, :widest],
                self._batch.num_blocks[rows],
                self._batch.profiles[rows],
            ],
            self._device,
        )
        return token_ids, last, AttentionMetadata(*where)


def _targets(item: ScheduledRequest, most: int) -> Iterator[tuple[int, list[int]]]:
    """(row in the item, tokens wanted behind it and the next rows), at most so many at a time."""
    targets, row = item.request.targets, item.request.next_scored
    if targets is None or row is None:
        return
    end = min(item.start + item.num_tokens, targets.first + len(targets.token_ids))
    for at in range(row, end, most):
        wanted = slice(at - targets.first, min(at + most, end) - targets.first)
        yield at - item.start, targets.token_ids[wanted]
