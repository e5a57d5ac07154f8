"""Carries out a step: batch tensors, the pages, the network, the sampler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.sampler import Sampler
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


class ModelRunner:
    """Executes SchedulerOutputs, one after the other."""

    def __init__(
        self,
        model: GPT2,
        backend: AttentionBackend,
        sampler: Sampler,
        batch: InputBatch,
    ) -> None:
        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._batch = batch
        self._block_size = backend.cache.block_size
        self._device = backend.cache.keys[0].device

    def execute(self, step: SchedulerOutput) -> StepResult:
        """Compute the step's tokens, sample behind the last known ones, score what is to be."""
        self._batch.release(step.released)
        for request_id in step.released:
            self._sampler.forget(request_id)
        for each in step.profiles:
            self._backend.put_profile(each.row, each.scaling, each.num_positions)
        if not step.scheduled:
            return StepResult([])
        token_ids, metadata = self._inputs(step.scheduled)
        sampling = [at for at, item in enumerate(step.scheduled) if item.samples]
        requests = [step.scheduled[at].request for at in sampling]
        self._sampler.prepare(requests)
        with torch.inference_mode():
            hidden = self._model(token_ids, self._backend.bind(metadata))
            scores = self._scores(step.scheduled, hidden)
            if not sampling:
                return StepResult([], scores)
            last = metadata.query_start[1:][sampling] - 1
            logits = self._model.logits(hidden[last]).float().cpu()
            return StepResult(self._sampler.sample(logits, requests), scores)

    def _scores(
        self, scheduled: Sequence[ScheduledRequest], hidden: Tensor
    ) -> dict[str, list[TokenLogprobs]]:
        """The targets behind the tokens of this step, by request id."""
        scores: dict[str, list[TokenLogprobs]] = {}
        begin = 0  # the item's first row
        for item in scheduled:
            for row, token_ids in _targets(item, SCORED_ROWS):
                rows = hidden[begin + row : begin + row + len(token_ids)]
                logits = self._model.logits(rows).float().cpu()
                scores.setdefault(item.request.request_id, []).extend(
                    self._sampler.score(logits, token_ids, item.request.params.logprobs or 0)
                )
            begin += item.num_tokens
        return scores

    def warm_up(self, num_rows: Sequence[int]) -> None:
        """Run the network once for each number of rows, so that no request pays for first calls.

        It writes to block 0, which must be free, by profile 0, which must have been put.
        """
        for rows in num_rows:
            count = min(rows, self._block_size, self._model.config.max_position)
            metadata = AttentionMetadata(
                query_start=self._tensor(np.array([0, count], np.int32)),
                positions=self._tensor(np.arange(count, dtype=np.int32)),
                slot_mapping=self._tensor(np.arange(count, dtype=np.int64)),
                block_tables=self._tensor(np.zeros((1, 1), np.int32)),
                bases=self._tensor(np.zeros((1, 1), np.int32)),
                num_blocks=self._tensor(np.ones(1, np.int32)),
                profiles=self._tensor(np.zeros(1, np.int32)),
            )
            token_ids = torch.zeros(count, dtype=torch.int64, device=self._device)
            with torch.inference_mode():
                self._model.logits(self._model(token_ids, self._backend.bind(metadata)))

    def _inputs(self, scheduled: Sequence[ScheduledRequest]) -> tuple[Tensor, AttentionMetadata]:
        token_ids: list[int] = []
        for item in scheduled:
            token_ids += item.request.token_ids[item.start : item.start + item.num_tokens]
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
        metadata = AttentionMetadata(
            query_start=self._tensor(query_start),
            positions=self._tensor(positions.astype(np.int32)),
            slot_mapping=self._tensor(slots),
            block_tables=self._tensor(self._batch.block_tables[rows, :widest]),
            bases=self._tensor(self._batch.bases[rows, :widest]),
            num_blocks=self._tensor(self._batch.num_blocks[rows]),
            profiles=self._tensor(self._batch.profiles[rows]),
        )
        return torch.tensor(token_ids, dtype=torch.int64, device=self._device), metadata

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _targets(item: ScheduledRequest, most: int) -> Iterator[tuple[int, list[int]]]:
    """(row in the item, tokens wanted behind it and the next rows), at most so many at a time."""
    targets, row = item.request.targets, item.request.next_scored
    if targets is None or row is None:
        return
    end = min(item.start + item.num_tokens, targets.first + len(targets.token_ids))
    for at in range(row, end, most):
        wanted = slice(at - targets.first, min(at + most, end) - targets.first)
        yield at - item.start, targets.token_ids[wanted]
