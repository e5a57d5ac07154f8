"""Steps on CUDA: decoding by graphs, one step ahead of the host."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.execution.cuda_graphs import (
    NOT_RUN,
    CudaRecorder,
    DecodeGraphs,
    DecodeState,
    DecodeStep,
)
from engine.execution.device_sampler import (
    WIDTH,
    DeviceSampler,
    read_logprobs,
    samples_on_device,
)
from engine.execution.runner import ModelRunner
from engine.execution.sampling_tensors import SamplingTensors
from engine.execution.transfer import Download, upload
from engine.messages import (
    SampledToken,
    ScheduledRequest,
    SchedulerOutput,
    StepResult,
    TokenLogprobs,
)
from engine.model.attention.base import AttentionBackend
from engine.request import Request

WARM_UP_SECONDS = 4.0
"""How long the start may take to record graphs; the rest is recorded when it is first needed."""


class SamplesTokens(Protocol):
    """A DeviceSampler."""

    def sample(self, logits: Tensor, params: SamplingTensors, sampled: Tensor) -> None:
        """See DeviceSampler.sample."""
        ...


@dataclass(slots=True)
class _Row:
    """A row of DecodeState: its number, how many pages it knows, and how many of the likeliest
    tokens it tells, None where it tells no log-probability."""

    number: int
    num_blocks: int
    num_logprobs: int | None


@dataclass(frozen=True, slots=True)
class _First:
    """Tokens that the device has drawn, by `params`, of rows that are not in the graph yet."""

    requests: Sequence[Request]
    params: SamplingTensors
    sampled: Tensor
    arriving: Download


@dataclass(frozen=True, slots=True)
class _Rest:
    """What of a step the graph has not computed, on its way to the host.

    on_host: requests whose logits are the rows of `logits`.
    """

    scores: dict[str, list[TokenLogprobs]]
    on_device: _First | None = None
    on_host: Sequence[Request] = ()
    logits: Download | None = None


class _Arrived:
    """What the device's sampler gave rows, once it is here."""

    def __init__(self, arriving: Download) -> None:
        self._lines: NDArray[np.int32] = arriving.wait().numpy()
        self._token_ids: list[int] = self._lines[:, 0].tolist()

    def token(self, row: int, num_logprobs: int | None) -> SampledToken:
        """The token of a row. Raises FloatingPointError where its logits were not finite: none
        would be right."""
        token_id = self._token_ids[row]
        if token_id == NOT_RUN:
            raise RuntimeError("a row that was to be computed was out of pages on the device")
        if token_id < 0:
            raise FloatingPointError("the model's logits are not finite")
        if num_logprobs is None:
            return SampledToken(token_id)
        return SampledToken(token_id, read_logprobs(self._lines[row], num_logprobs))


class GraphRunner:
    """Decodes by graphs, and begins the next step before it has this one's tokens.

    While a step runs on the device, the host schedules it: what the scheduler asks for is mostly
    what is being computed. A row that is asked for no more (its token before was its last, or it
    was aborted or preempted) has been computed for nothing: its token is dropped, and what it wrote
    lies in pages whose next owner writes to them later, since the device does one thing after the
    other.

    What else a step has (chunks of prompts, rows whose token needs the host, rows that were out of
    pages) goes the way of ModelRunner; a row that needs no host is in the graph from its next token
    on. Which of the two samplers a request has depends on its parameters alone.
    """

    looks_ahead = True

    def __init__(
        self,
        eager: ModelRunner,
        state: DecodeState,
        graphs: DecodeGraphs,
        sampler: SamplesTokens,
    ) -> None:
        """sampler: the one in the graphs."""
        self._eager = eager
        self._state = state
        self._graphs = graphs
        self._sampler = sampler
        self._vocab_size = eager.model.config.vocab_size
        self._rows: dict[str, _Row] = {}  # who is on the device, and so in the step that runs
        self._vacant: list[int] = []  # rows that the device does not yet know to be left
        self._running: Download | None = None  # the tokens of the step that runs

    @classmethod
    def on_cuda(
        cls,
        eager: ModelRunner,
        backend: AttentionBackend,
        unused_token_ids: Sequence[int],
        max_num_seqs: int,
        max_blocks: int,
    ) -> GraphRunner:
        """With graphs of the whole step. max_blocks: pages of a request that is in them."""
        device = backend.cache.keys[0].device
        block_size, vocab_size = backend.cache.block_size, eager.model.config.vocab_size
        state = DecodeState(max_num_seqs, max_blocks, block_size, vocab_size, device)
        sampler = DeviceSampler(vocab_size, unused_token_ids, device)
        step = DecodeStep(eager.model, backend, sampler, state)
        return cls(eager, state, DecodeGraphs(step, state, CudaRecorder()), sampler)

    @property
    def name(self) -> str:
        """See Runner."""
        graphs = self._graphs
        return (
            f"{graphs.num_recorded} of {len(graphs.buckets)} batch sizes up to "
            f"{graphs.buckets[-1]} recorded, {graphs.memory / 2**20:.0f} MiB"
        )

    @property
    def ahead(self) -> Collection[str]:
        """See Runner."""
        return self._rows

    def warm_up(self, num_rows: Sequence[int]) -> None:
        """See Runner."""
        self._eager.warm_up(num_rows)
        with torch.inference_mode():
            self._graphs.record_ahead(WARM_UP_SECONDS)

    def execute(self, step: SchedulerOutput) -> StepResult:
        """See Runner."""
        self._eager.begin(step)
        self._leave(step.released)
        asked = {item.request.request_id for item in step.scheduled}
        self._leave([request_id for request_id in self._rows if request_id not in asked])
        computed = dict(self._rows)
        arriving, self._running = self._running, None
        with torch.inference_mode():
            rest = self._compute(
                [item for item in step.scheduled if item.request.request_id not in computed]
            )
            self._launch(step.scheduled, rest)
            tokens: dict[str, SampledToken] = {}
            if computed and arriving is not None:
                arrived = _Arrived(arriving)
                tokens = {
                    name: arrived.token(row.number, row.num_logprobs)
                    for name, row in computed.items()
                }
            tokens |= self._finish(rest)
        return StepResult(
            [tokens[item.request.request_id] for item in step.scheduled if item.samples],
            rest.scores,
        )

    def _compute(self, items: list[ScheduledRequest]) -> _Rest:
        """Begin what no graph computes. Rows with targets are waited for."""
        if not items:
            return _Rest({})
        # So that the rows of either sampler lie side by side.
        items.sort(key=lambda item: (not item.samples, not samples_on_device(item.request)))
        requests = [item.request for item in items if item.samples]
        on_device = [request for request in requests if samples_on_device(request)]
        on_host = requests[len(on_device) :]
        self._eager.sampler.prepare(on_host)
        hidden, last = self._eager.forward(items)
        scores = self._eager.scores(items, hidden)
        if not requests:
            return _Rest(scores)
        logits = self._eager.model.logits(hidden[last])
        first = below = None
        if on_device:
            params = SamplingTensors.of(on_device, self._vocab_size, logits.device)
            sampled = torch.empty((len(on_device), WIDTH), dtype=torch.int32, device=logits.device)
            self._sampler.sample(logits[: len(on_device)], params, sampled)
            first = _First(on_device, params, sampled, Download.start(sampled))
        if on_host:
            below = Download.start(logits[len(on_device) :].float())
        return _Rest(scores, first, on_host, below)

    def _finish(self, rest: _Rest) -> dict[str, SampledToken]:
        """The tokens of what no graph has computed, by request id."""
        tokens: dict[str, SampledToken] = {}
        if rest.on_device is not None:
            arrived = _Arrived(rest.on_device.arriving)
            for row, request in enumerate(rest.on_device.requests):
                tokens[request.request_id] = arrived.token(row, self._told(request))
        if rest.logits is not None:
            sampled = self._eager.sampler.sample(rest.logits.wait(), rest.on_host)
            for request, chosen in zip(rest.on_host, sampled, strict=True):
                tokens[request.request_id] = chosen
        return tokens

    def _told(self, request: Request) -> int | None:
        """How many of the likeliest tokens it is told; None: no log-probability at all."""
        wanted = request.params.logprobs
        return None if wanted is None else min(wanted, self._vocab_size)

    def _leave(self, request_ids: Iterable[str]) -> None:
        """These are not on the device any more."""
        for request_id in request_ids:
            row = self._rows.pop(request_id, None)
            if row is not None:
                self._vacant.append(row.number)

    def _launch(self, scheduled: Sequence[ScheduledRequest], rest: _Rest) -> None:
        """Begin the next step of all that need nothing but the tokens of this one."""
        first = rest.on_device
        fresh = () if first is None else first.requests
        places = {request.request_id: at for at, request in enumerate(fresh)}
        grown: list[tuple[int, list[int]]] = []
        new: list[ScheduledRequest] = []
        for item in scheduled:
            request = item.request
            row = self._rows.get(request.request_id)
            if row is None:
                if request.request_id in places and self._goes_on(item):
                    new.append(item)
            elif not self._goes_on(item):
                self._leave([request.request_id])
            elif row.num_blocks != len(request.block_table):
                row.num_blocks = len(request.block_table)
                grown.append((row.number, request.block_table))
        if not self._rows and not new:
            return
        self._state.release(self._vacant)
        self._vacant = []
        if grown:
            self._state.put_tables(*zip(*grown, strict=True))
        if first is not None and new:
            self._enter(new, first, [places[item.request.request_id] for item in new])
        num_rows = 1 + max(row.number for row in self._rows.values())
        self._graphs.launch(num_rows)
        self._running = Download.start(self._state.sampled[:num_rows])

    def _goes_on(self, item: ScheduledRequest) -> bool:
        """Whether the token that comes may be computed on at once: it is not the last, and it has a
        page (where pages shift, it has none)."""
        request = item.request
        pages = len(request.block_table)
        return (
            request.num_output_tokens + 1 < request.max_tokens
            and item.position + item.num_tokens < pages * self._state.block_size
            and pages <= self._state.max_blocks
        )

    def _enter(self, items: Sequence[ScheduledRequest], first: _First, places: list[int]) -> None:
        """Give requests rows. places: which of the first tokens is each one's."""
        requests = [item.request for item in items]
        numbers = [self._state.take() for _ in items]
        positions = [item.position + item.num_tokens for item in items]
        profiles = [request.profile for request in requests]
        at = self._state.put(
            numbers,
            {
                "positions": np.array(positions, np.int32),
                "profiles": np.array(profiles, np.int32),
            },
        )
        self._state.put_tables(numbers, [request.block_table for request in requests])
        (chosen,) = upload([np.array(places, np.int64)], at.device)
        # One that is not finite is refused when it arrives; until then it must be some token.
        tokens = first.sampled[chosen, 0].clamp(min=0).long()
        self._state.token_ids[at] = tokens
        self._state.sampling.take_over(at, first.params, chosen, tokens)
        for request, number in zip(requests, numbers, strict=True):
            pages = len(request.block_table)
            self._rows[request.request_id] = _Row(number, pages, self._told(request))
