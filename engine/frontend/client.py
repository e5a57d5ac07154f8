"""AsyncEngine: the HTTP process's end of the engine. Tokenise, admit, stream, abort."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
import zmq.asyncio

from engine.errors import (
    EngineDead,
    EngineError,
    EngineStartError,
    EngineStarting,
    PoisonedRequest,
    QueueFull,
)
from engine.frontend.admission import Admission, Usage
from engine.frontend.connection import Connection
from engine.frontend.output import OutputProcessor, TokenDelta
from engine.frontend.tokenizer import Tokenizer
from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    EngineReady,
    EngineStats,
    Hello,
    StepOutput,
    ToCore,
    TokenLogprobs,
)
from engine.request import FinishReason, RequestOptions, SamplingParams


@dataclass(slots=True)
class Timing:
    """Moments of a request, in seconds after it was submitted; None until they happen."""

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None


logger = logging.getLogger(__name__)


class Stream:
    """The tokens of one request as they come: `async for deltas in stream`.

    Each step of the loop yields every token that came since the last one, so a slow reader gets
    fewer, larger pieces. After the loop finish_reason, usage and timing are settled, and scores
    where a text was to be scored. If the engine dies and is not started again, the tokens that came
    are yielded and then EngineDead is raised. Leaving early must be followed by close(), which
    frees the request's pages; `async with` does so.
    """

    def __init__(
        self, request: AddRequest, tokenizer: Tokenizer, close: Callable[[Stream], None]
    ) -> None:
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.seed = request.seed
        self.scores: list[TokenLogprobs] | None = None
        self._request = request
        self.timing = Timing()
        self._cached_tokens = 0
        self._token_ids: list[int] = []
        self._suspect = False
        self._output = OutputProcessor(tokenizer, request.params, frozenset(request.stop_token_ids))
        self._submitted = time.monotonic()
        self._waiting: list[TokenDelta] = []
        self._news = asyncio.Event()
        self._error: EngineError | None = None
        self._close = close

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output is complete; None while it is not."""
        return self._output.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage.of(self._request, self._output.num_tokens, self._cached_tokens)

    def close(self) -> None:
        """Abort, unless the request has ended."""
        self._close(self)

    def deliver(self, output: EngineOutput) -> None:
        """Take a token, or the end without one, from the engine."""
        now = time.monotonic() - self._submitted
        if (delta := self._output.process(output)) is not None:
            self._waiting.append(delta)
            self._token_ids.append(delta.token_id)
            self._suspect = False
            if self.timing.first_token is None:
                self.timing.first_token = now
                self.timing.queue = output.queue_seconds
                self._cached_tokens = output.cached_tokens
                self.scores = output.scores
        if self.finish_reason is not None:
            self.timing.total = now
        self._news.set()

    def again(self, suspects: Sequence[str]) -> AddRequest:
        """The request for another engine, which goes on where this stream is."""
        self._suspect = self._suspect or self.request_id in suspects
        return msgspec.structs.replace(
            self._request,
            output_token_ids=self._token_ids,
            elapsed_s=time.monotonic() - self._submitted,
            suspect=self._suspect,
            targets=None if self._token_ids else self._request.targets,
        )

    def fail(self, error: EngineError) -> None:
        """End the stream by an error."""
        self._error = error
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._waiting:
            if self.finish_reason is not None:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        deltas, self._waiting = self._waiting, []
        return deltas

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncEngine:
    """A connection to the engine process, for one event loop.

    max_queue: requests that may wait beyond those that run; num_workers: connections of its kind,
    of which each lets in its share of both. recovers: somebody starts the engine process again when
    it dies; until it is ready, open streams wait, and then they go on as if nothing had happened.
    Whoever gives that up calls fail().
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        address: str,
        *,
        max_queue: int,
        num_workers: int = 1,
        recovers: bool = False,
    ) -> None:
        """address: where the engine process listens, a ZeroMQ endpoint."""
        self.tokenizer = tokenizer
        self.ready: EngineReady | None = None
        self.stats = EngineStats()
        self._address = address
        self._max_queue = max_queue
        self._num_workers = num_workers
        self._streams: dict[str, Stream] = {}
        self._admission: Admission | None = None
        self._error: EngineError | None = None
        self._recovers = recovers
        self._context = zmq.asyncio.Context()
        self._connection: Connection | None = None
        self._running: asyncio.Task[None] | None = None
        self.deaths = 0

    @property
    def alive(self) -> bool:
        """Whether the engine has not failed; it may still be starting."""
        return self._error is None

    @property
    def error(self) -> EngineError | None:
        """Why the engine failed; None while it has not."""
        return self._error

    @property
    def unready(self) -> EngineError | None:
        """Why a request would not be served now; None where it would."""
        if self._error is None and self.ready is None:
            again = " again after a crash" if self.deaths else ""
            return EngineStarting(f"the model is still being loaded{again}; try again soon")
        return self._error

    @property
    def num_unfinished(self) -> int:
        """Streams that are open in this process."""
        return len(self._streams)

    async def start(self, exited: Callable[[], int | None]) -> EngineReady:
        """Connect and wait until the model is loaded.

        exited: the engine process's exit status, None while it lives. Raises EngineStartError.
        """
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._ended)
        while self.ready is None:
            if (status := exited()) is not None:
                self.fail(EngineStartError(f"the engine process ended with status {status}"))
            if self._error is not None:
                raise self._error
            await asyncio.sleep(0.02)
        return self.ready

    def submit(
        self,
        request_id: str,
        prompt: str | list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
    ) -> Stream:
        """Start a request. Raises RequestError, QueueFull or EngineError."""
        return self._enter(
            request_id, lambda admission: admission.admit(request_id, prompt, params, options)
        )

    def score(
        self,
        request_id: str,
        text: str | list[int],
        options: RequestOptions = RequestOptions(),
        *,
        first: int = 1,
        top: int = 0,
    ) -> Stream:
        """Start the scoring of a text; see Admission.admit_score. When the stream has ended,
        `scores` holds the log-probabilities of the tokens from `first` on.

        Raises RequestError, QueueFull or EngineError.
        """
        return self._enter(
            request_id,
            lambda admission: admission.admit_score(
                request_id, text, options, first=first, top=top
            ),
        )

    def _enter(self, request_id: str, admit: Callable[[Admission], AddRequest]) -> Stream:
        if self._admission is None or self.ready is None:
            raise self.unready or EngineStarting("not started")
        if self._error is not None:
            raise self._error
        limit = -(-(self.ready.max_num_seqs + self._max_queue) // self._num_workers)
        if len(self._streams) >= limit:
            raise QueueFull(
                f"{len(self._streams)} requests run or wait; the limit is {limit} "
                f"(max_num_seqs {self.ready.max_num_seqs} + max_queue {self._max_queue}"
                f"{f', over {self._num_workers} workers' if self._num_workers > 1 else ''})"
            )
        if request_id in self._streams:
            raise ValueError(f"request id {request_id} is in use")
        request = admit(self._admission)
        stream = Stream(request, self.tokenizer, self._close_stream)
        self._streams[request_id] = stream
        self._send(request)
        return stream

    async def close(self) -> None:
        """Hang up. Open streams fail."""
        self.fail(EngineDead("the engine was shut down"))
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._context.term()

    def fail(self, error: EngineError) -> None:
        """Note that the engine is gone; every open stream ends by the error."""
        self._error = self._error or error
        for stream in self._streams.values():
            stream.fail(self._error)
        self._streams.clear()

    def _close_stream(self, stream: Stream) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._send(AbortRequest(stream.request_id))

    def _send(self, message: ToCore) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def _run(self) -> None:
        """One connection after the other, each until the engine process dies."""
        while self._error is None:
            self._connection = connection = Connection(self._context, self._address)
            self._send(Hello())
            receiving = asyncio.create_task(self._receive(connection))
            lost = asyncio.create_task(connection.lost())
            try:
                await asyncio.wait((receiving, lost), return_when=asyncio.FIRST_COMPLETED)
                # The reader never ends by itself: if it has, it failed, and so does this.
                await (receiving if receiving.done() else lost)
            finally:
                for task in (receiving, lost):
                    task.cancel()
                await asyncio.gather(receiving, lost, return_exceptions=True)
                self._connection = None
                connection.close()
            if not self._recovers:
                self.fail(EngineDead("the engine process died"))
            # A dying process may still accept a connection: that is not another death.
            self.deaths += self.ready is not None
            self.ready = self._admission = None

    async def _receive(self, connection: Connection) -> None:
        while True:
            message = await connection.receive()
            if isinstance(message, StepOutput):
                self.stats = message.stats
                for output in message.outputs:
                    self._deliver(output)
            else:
                self._welcome(message)

    def _welcome(self, ready: EngineReady) -> None:
        """An engine is ready: give it the streams that are open, but not what kills it."""
        self.ready = ready
        self._admission = Admission(self.tokenizer, ready)
        for stream in list(self._streams.values()):
            if stream.request_id in ready.poisoned:
                del self._streams[stream.request_id]
                stream.fail(
                    PoisonedRequest("the engine died of this request, also when it ran alone")
                )
            else:
                self._send(stream.again(ready.suspects))

    def _deliver(self, output: EngineOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:  # aborted while this output was under way
            return
        stream.deliver(output)
        if stream.finish_reason is not None:
            del self._streams[output.request_id]
            if output.finish_reason is None:  # a stop string, which only this side knows of
                self._send(AbortRequest(output.request_id))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """No stream may wait for a task that is gone."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            logger.error("the connection to the engine broke", exc_info=fault)
            self.fail(EngineDead(f"the connection to the engine broke: {fault!r}"))
