"""Decode steps as CUDA graphs: the rows' state lives on the device, a graph for each batch bucket.

A step costs the device little and the host much: hundreds of launches. A graph is one. It reads and
writes fixed addresses, so what changes between steps (tokens, positions, block tables, sampling
parameters) is state on the device: the step itself moves it forward, and the host writes only what
it alone knows, such as a new row or a new page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from time import monotonic
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.device_sampler import WIDTH, DeviceSampler
from engine.execution.kernels import step as kernels
from engine.execution.sampling_tensors import SamplingTensors
from engine.execution.transfer import upload
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
    block_tables int32, num_blocks int32   its pages; 0 of them: nobody is there
    bases int32        of pages: always their place in the table times the block size
    profiles int32     its rotation
    sampling           see SamplingTensors
    sampled int32      [max_rows, WIDTH] what the last step gave; the token is NOT_RUN or -1 (logits
                       not finite) where there is none
    """

    def __init__(
        self,
        max_rows: int,
        max_blocks: int,
        block_size: int,
        vocab_size: int,
        device: torch.device | str,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_rows = max_rows
        self.max_blocks = max_blocks
        self.block_size = block_size
        self.token_ids = zeros(max_rows, dtype=torch.int64)
        self.positions = zeros(max_rows)
        self.block_tables = zeros(max_rows, max_blocks)
        places = torch.arange(max_blocks, dtype=torch.int32, device=device)
        self.bases = (places * block_size).repeat(max_rows, 1)
        self.num_blocks = zeros(max_rows)
        self.profiles = zeros(max_rows)
        self.sampled = zeros(max_rows, WIDTH)
        self.sampling = SamplingTensors.vacant(max_rows, vocab_size, device)
        self._free = list(range(max_rows))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the host may write, by name."""
        own = ("token_ids", "positions", "block_tables", "num_blocks", "profiles")
        return {name: getattr(self, name) for name in own} | vars(self.sampling)

    def take(self) -> int:
        """The lowest free row, so that few buckets are enough. IndexError where all are taken."""
        return heappop(self._free)

    def put(self, rows: Sequence[int], values: Mapping[str, NDArray[np.generic]]) -> Tensor:
        """Write some rows of the tensors named, [len(rows), ...]; a table may be narrower than the
        state's. In the order of the device's other work; returns rows int64, on the device."""
        numbers = np.array(rows, np.int64)
        at, *contents = upload([numbers, *values.values()], self.token_ids.device)
        tensors = self.tensors
        for name, content in zip(values, contents, strict=True):
            target = tensors[name]
            if content.ndim == 2:
                target = target[:, : content.shape[1]]
            target[at] = content.to(target.dtype)
        return at

    def put_tables(self, rows: Sequence[int], tables: Sequence[Sequence[int]]) -> None:
        """Write the pages of some rows, as they are now."""
        counts = [len(table) for table in tables]
        blocks = np.zeros((len(rows), max(counts)), np.int32)
        for line, table in zip(blocks, tables, strict=True):
            line[: len(table)] = table
        self.put(rows, {"num_blocks": np.array(counts, np.int32), "block_tables": blocks})

    def release(self, rows: Sequence[int]) -> None:
        """Nobody is in these rows any more."""
        if rows:
            self.put(rows, {"num_blocks": np.zeros(len(rows), np.int32)})
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
        self._slots = torch.zeros(state.max_rows, dtype=torch.int64, device=device)

    def __call__(self, num_rows: int) -> None:
        """Compute the first num_rows rows, without a word to the host."""
        state, sampling = self._state, self._state.sampling
        kernels.begin[(num_rows,)](
            state.positions,
            state.block_tables,
            state.num_blocks,
            self._slots,
            sampling.present,
            state.max_blocks,
            block_size=state.block_size,
            num_warps=1,
        )
        metadata = AttentionMetadata(
            query_start=self._starts[: num_rows + 1],
            positions=state.positions[:num_rows],
            slot_mapping=self._slots[:num_rows],
            block_tables=state.block_tables[:num_rows],
            bases=state.bases[:num_rows],
            num_blocks=sampling.present[:num_rows],
            profiles=state.profiles[:num_rows],
        )
        hidden = self._model(state.token_ids[:num_rows], self._backend.bind(metadata))
        self._sampler.sample(
            self._model.logits(hidden), sampling.first(num_rows), state.sampled[:num_rows]
        )
        kernels.advance[(num_rows,)](
            sampling.present,
            state.sampled,
            state.token_ids,
            state.positions,
            sampling.index,
            sampling.penalties,
            sampling.counts,
            WIDTH,
            counts_width=sampling.counts.shape[1],
            not_run=NOT_RUN,
            num_warps=1,
        )


class Recorder(Protocol):
    """Makes a graph of work on the device."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work that ran before; returns what runs it again."""
        ...

    def free_memory(self) -> int:
        """Bytes of the device that nobody has."""
        ...


class CudaRecorder:
    """torch.cuda.graph; all graphs share one pool of memory, since one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are watched: another may find a grammar's masks meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay

    @staticmethod
    def free_memory() -> int:
        """Bytes of the device that nobody has."""
        free, _ = torch.cuda.mem_get_info()
        return free


class DecodeGraphs:
    """A graph for each bucket, recorded when it is first needed, or before."""

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
        self.memory = 0

    @property
    def num_recorded(self) -> int:
        """How many graphs there are."""
        return len(self._replays)

    def bucket(self, num_rows: int) -> int:
        """The smallest bucket that holds the first num_rows rows."""
        return self.buckets[bisect_left(self.buckets, num_rows)]

    def launch(self, num_rows: int) -> None:
        """Run a step over the first num_rows rows, num_rows from 1 to the state's size."""
        bucket = self.bucket(num_rows)
        if bucket not in self._replays:
            self._record(bucket)
        self._replays[bucket]()

    def record_ahead(self, seconds: float, clock: Callable[[], float] = monotonic) -> None:
        """Record graphs until so much time is over, small ones first, one in any case. The others
        are recorded when they are first needed."""
        end = clock() + seconds
        for bucket in self.buckets:
            if bucket not in self._replays:
                self._record(bucket)
            if clock() >= end:
                break

    def _record(self, bucket: int) -> None:
        """Run the work once, for what it compiles, with nobody in the rows: nothing is changed."""
        before = self._recorder.free_memory()
        counts = self._state.num_blocks.clone()
        self._state.num_blocks.zero_()
        self._step(bucket)
        self._state.num_blocks.copy_(counts)
        self._replays[bucket] = self._recorder(lambda: self._step(bucket))
        self.memory += max(0, before - self._recorder.free_memory())
