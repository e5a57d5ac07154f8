"""Decode steps as CUDA graphs: the rows' state lives on the device, a graph for each batch bucket.

A step costs the device little and the host much: hundreds of launches. A graph is one. It reads and
writes fixed addresses, so what changes between steps (tokens, positions, block tables, sampling
parameters) is state on the device: the step itself moves it forward, and the host writes only what
it alone knows, such as a new row or a new page. The host reads the tokens of a step while the next
one runs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from typing import Protocol

import torch
from torch import Tensor

from engine.execution.device_sampler import DeviceSampler, SamplingTensors
from engine.model.attention.base import AttentionBackend, AttentionMetadata
from engine.model.gpt2 import GPT2

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows that a graph computes. The rest are absent rows, which cost next to nothing."""

NOT_RUN = -2
"""What stands for the token of a row that a step did not compute: absent, or out of pages."""


class DecodeState:
    """Rows on the device, each a request that decodes; [max_rows], or [max_rows, max_blocks].

    token_ids int64    the last token, whose successor comes next
    positions int32    where it stands
    block_tables, bases int32, num_blocks int32   its pages; 0 of them: nobody is there
    profiles int32     its rotation
    sampling           see SamplingTensors
    sampled int32      what the last step gave; NOT_RUN or -1 (logits not finite) for no token
    """

    def __init__(self, max_rows: int, max_blocks: int, device: torch.device | str) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_rows = max_rows
        self.token_ids = zeros(max_rows, dtype=torch.int64)
        self.positions = zeros(max_rows)
        self.block_tables = zeros(max_rows, max_blocks)
        self.bases = zeros(max_rows, max_blocks)
        self.num_blocks = zeros(max_rows)
        self.profiles = zeros(max_rows)
        self.sampled = zeros(max_rows)
        self.sampling = SamplingTensors.greedy(max_rows, device)
        self._free = list(range(max_rows))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the host may write, by name."""
        own = ("token_ids", "positions", "block_tables", "bases", "num_blocks", "profiles")
        sampling = {each.name: getattr(self.sampling, each.name) for each in fields(self.sampling)}
        return {name: getattr(self, name) for name in own} | sampling

    def take(self) -> int:
        """The lowest free row, so that few buckets are enough. IndexError where all are taken."""
        return heappop(self._free)

    def put(self, rows: Sequence[int], values: Mapping[str, Tensor]) -> None:
        """Write some rows of the tensors named, [len(rows), ...]; a table may be narrower than the
        state's. In the order of the device's other work."""
        device = self.token_ids.device
        at = torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True)
        tensors = self.tensors
        for name, value in values.items():
            target = tensors[name]
            if value.ndim == 2:
                target = target[:, : value.shape[1]]
            target[at] = value.to(device, target.dtype, non_blocking=True)

    def release(self, rows: Sequence[int]) -> None:
        """Nobody is in these rows any more."""
        if rows:
            self.put(rows, {"num_blocks": torch.zeros(len(rows), dtype=torch.int32)})
        for row in rows:
            heappush(self._free, row)


class DecodeStep:
    """What a graph holds: the network over the first rows, sampling, and the state moved on.

    A row that is out of pages is left as it is; its token is NOT_RUN.
    """

    def __init__(
        self, model: GPT2, backend: AttentionBackend, sampler: DeviceSampler, state: DecodeState
    ) -> None:
        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._state = state
        device = state.token_ids.device
        self._starts = torch.arange(state.max_rows + 1, dtype=torch.int32, device=device)

    def __call__(self, num_rows: int) -> None:
        """Compute the first num_rows rows, without a word to the host."""
        state, size = self._state, self._backend.cache.block_size
        positions, tables = state.positions[:num_rows], state.block_tables[:num_rows]
        present = positions < state.num_blocks[:num_rows] * size
        page = (positions // size).clamp(max=tables.shape[1] - 1)  # beyond it nobody is present
        block = tables.gather(1, page.long()[:, None])[:, 0].long()
        metadata = AttentionMetadata(
            query_start=self._starts[: num_rows + 1],
            positions=positions,
            slot_mapping=torch.where(present, block * size + positions % size, -1),
            block_tables=tables,
            bases=state.bases[:num_rows],
            num_blocks=torch.where(present, state.num_blocks[:num_rows], 0),
            profiles=state.profiles[:num_rows],
        )
        token_ids = state.token_ids[:num_rows]
        hidden = self._model(token_ids, self._backend.bind(metadata))
        sampled = state.sampled[:num_rows]
        sampling = SamplingTensors(
            **{
                each.name: getattr(state.sampling, each.name)[:num_rows]
                for each in fields(SamplingTensors)
            }
        )
        self._sampler.sample(self._model.logits(hidden), sampling, sampled)
        token_ids.copy_(torch.where(present, sampled.clamp(min=0).long(), token_ids))
        sampled.masked_fill_(~present, NOT_RUN)
        positions.add_(present)
        sampling.index.add_(present)


class Recorder(Protocol):
    """Makes a graph of work on the device."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work that ran before; returns what runs it again."""
        ...


class CudaRecorder:
    """torch.cuda.graph; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


class DecodeGraphs:
    """A graph for each bucket, recorded when it is first needed."""

    def __init__(
        self,
        step: Callable[[int], None],
        state: DecodeState,
        recorder: Recorder,
        buckets: Sequence[int] = BUCKETS,
    ) -> None:
        """buckets: ascending; those that the state does not hold are left out, its size is in."""
        self._step = step
        self._state = state
        self._recorder = recorder
        self.buckets = [each for each in buckets if each < state.max_rows] + [state.max_rows]
        self._replays: dict[int, Callable[[], None]] = {}

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds the first num_rows rows."""
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def launch(self, num_rows: int) -> None:
        """Run a step over the first num_rows rows, num_rows from 1 to the state's size."""
        bucket = self.bucket(num_rows)
        if bucket not in self._replays:
            self._replays[bucket] = self._record(bucket)
        self._replays[bucket]()

    def _record(self, bucket: int) -> Callable[[], None]:
        """Run the work once, for what it compiles, with nobody in the rows: nothing is changed."""
        counts = self._state.num_blocks.clone()
        self._state.num_blocks.zero_()
        self._step(bucket)
        self._state.num_blocks.copy_(counts)
        return self._recorder(lambda: self._step(bucket))


@dataclass(frozen=True)
class PendingTokens:
    """Tokens on their way to the host."""

    _buffer: Tensor
    _arrived: torch.cuda.Event | None

    def read(self) -> list[int]:
        """Wait for the step, not for the one after it. FloatingPointError where logits were not
        finite: no token would be right."""
        if self._arrived is not None:
            self._arrived.synchronize()
        tokens: list[int] = self._buffer.tolist()
        if -1 in tokens:
            raise FloatingPointError("the model's logits are not finite")
        return tokens


class TokenReader:
    """Copies the tokens of a step into pinned memory. Two buffers: while one step's tokens are
    read, the next one's may arrive."""

    def __init__(self, state: DecodeState) -> None:
        self._state = state
        self._cuda = state.sampled.is_cuda
        self._buffers = [
            torch.zeros(state.max_rows, dtype=torch.int32, pin_memory=self._cuda) for _ in range(2)
        ]
        self._turn = 0

    def start(self, num_rows: int) -> PendingTokens:
        """After a launch: what its first num_rows rows gave, before another launch writes there.

        The one before the last must have been read.
        """
        self._turn = 1 - self._turn
        buffer = self._buffers[self._turn][:num_rows]
        buffer.copy_(self._state.sampled[:num_rows], non_blocking=True)
        if not self._cuda:
            return PendingTokens(buffer, None)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
        arrived.record()
        return PendingTokens(buffer, arrived)
