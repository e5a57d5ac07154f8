"""What the network is given for a step: token ids, and where they and their pages lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.transfer import upload
from engine.messages import ScheduledRequest
from engine.model.attention.base import Attention, AttentionBackend, AttentionMetadata
from engine.request import Request


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
        self.changes = 0  # how often any of these has
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
            self.num_blocks[row] = 0  # written anew below, and so counted
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
            self.changes += 1
        return row

    def _widen(self, num_blocks: int) -> None:
        more = max(num_blocks, 2 * self.block_tables.shape[1]) - self.block_tables.shape[1]
        self.block_tables = np.pad(self.block_tables, ((0, 0), (0, more)))
        self.bases = np.pad(self.bases, ((0, 0), (0, more)))


class StepInputs(NamedTuple):
    """token_ids int64 [num_rows]; last int64: the rows behind which a token is sampled."""

    token_ids: Tensor
    last: Tensor
    attention: Attention


class Inputs:
    """Makes the inputs of steps; while the same rows decode, only writes them anew."""

    def __init__(self, batch: InputBatch, backend: AttentionBackend) -> None:
        self._batch = batch
        self._backend = backend
        self._block_size = backend.cache.block_size
        self._device = backend.cache.keys[0].device
        self._in_place = backend.reads_each_call
        self._decode: DecodeInputs | None = None

    def of(self, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        """What the network is given for a step; the next call may write over it."""
        rows = [self._batch.row(item.request) for item in scheduled]
        decodes = all(item.num_tokens == 1 and item.samples for item in scheduled)
        if not self._in_place or not decodes:
            return self._gathered(scheduled, np.array(rows))
        if self._decode is None or not self._decode.serves(rows):
            self._decode = DecodeInputs(rows, self._batch, self._backend)
        return self._decode.at(scheduled)

    def _gathered(
        self, scheduled: Sequence[ScheduledRequest], rows: NDArray[np.int64]
    ) -> StepInputs:
        known: list[int] = []
        for item in scheduled:
            known += item.request.token_ids[item.start : item.start + item.num_tokens]
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
        return StepInputs(token_ids, last, self._backend.bind(AttentionMetadata(*where)))


class DecodeInputs:
    """Inputs of steps that compute one token in each of the same rows of the batch, changed in
    place. The requests in those rows may change.

    For a backend that reads them at every call, and has read them all when a step has ended.
    """

    SPARE_BLOCKS = 8
    """Columns of the tables for what the requests will gain."""

    def __init__(self, rows: list[int], batch: InputBatch, backend: AttentionBackend) -> None:
        """rows: of the requests in the batch."""
        self._rows, self._index = rows, np.array(rows)
        self._batch = batch
        self._changes = batch.changes
        self._block_size = backend.cache.block_size
        count = len(rows)
        width = int(batch.num_blocks[rows].max()) + self.SPARE_BLOCKS
        self._width = min(width, batch.block_tables.shape[1])
        self._lines = np.arange(count)  # of the tables, to choose one page of each
        self._token_ids: NDArray[np.int64] = np.empty(count, np.int64)
        self._positions: NDArray[np.int32] = np.empty(count, np.int32)
        self._slots: NDArray[np.int64] = np.empty(count, np.int64)
        self._tables = batch.block_tables[rows, : self._width]
        self._bases = batch.bases[rows, : self._width]
        self._counts = batch.num_blocks[rows]
        self._profiles = batch.profiles[rows]
        where = (
            np.arange(count + 1, dtype=np.int32),
            self._positions,
            self._slots,
            self._tables,
            self._bases,
            self._counts,
            self._profiles,
        )
        metadata = AttentionMetadata(*map(torch.from_numpy, where))
        self._inputs = StepInputs(
            torch.from_numpy(self._token_ids), torch.arange(count), backend.bind(metadata)
        )

    def serves(self, rows: list[int]) -> bool:
        """Whether these are its rows and their tables fit; if so, takes in what has changed."""
        if rows != self._rows:
            return False
        if self._changes != self._batch.changes:
            self._counts[:] = self._batch.num_blocks[self._index]
            if self._counts.max() > self._width:
                return False
            self._tables[:] = self._batch.block_tables[self._index, : self._width]
            self._bases[:] = self._batch.bases[self._index, : self._width]
            self._profiles[:] = self._batch.profiles[self._index]
            self._changes = self._batch.changes
        return True

    def at(self, scheduled: Sequence[ScheduledRequest]) -> StepInputs:
        """Of a step with one token of each."""
        self._token_ids[:] = [item.request.token_ids[item.start] for item in scheduled]
        self._positions[:] = [item.position for item in scheduled]
        blocks, offsets = np.divmod(self._positions, self._block_size)
        np.multiply(
            self._tables[self._lines, blocks], self._block_size, out=self._slots, dtype=np.int64
        )
        self._slots += offsets
        return self._inputs
