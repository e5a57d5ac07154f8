"""AsyncEngine: the HTTP process's end of the engine. Tokenise, admit, stream, abort."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec
import zmq.asyncio

from engine.errors import (
    EngineDead,
    EngineError,
    EngineStartError,
    EngineStarting,
    InvalidRequest,
    PoisonedRequest,
    QueueFull,
)
from engine.frontend.admission import Admission
from engine.frontend.connection import Connection
from engine.frontend.stream import Stream, StreamGroup, StreamState
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
from engine.params import RequestOptions, SamplingParams
from engine.request import Targets
from engine.scaling import RopeScaling

logger = logging.getLogger(__name__)


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
        return self.submit_all(request_id, [prompt], params, options).streams[0]

    def submit_all(
        self,
        request_id: str,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
        num_choices: int = 1,
        *,
        name: str = "prompt",
        score_prompts: bool = False,
    ) -> StreamGroup:
        """Start num_choices requests for each prompt; either all of them or none.

        A choice's tokens depend on the seed and its number. Without a seed each prompt draws one.
        name: what errors call the prompt. score_prompts: from its first token on, a stream's
        `scores` are the log-probabilities of its prompt's tokens but the first. Raises
        RequestError, QueueFull or EngineError.
        """

        def admit(admission: Admission, at: int, called: str) -> list[AddRequest]:
            first = admission.admit(request_id, prompts[at], params, options, called)
            if score_prompts and len(first.prompt_token_ids) > 1:
                targets = Targets(0, first.prompt_token_ids[1:])
                first = msgspec.structs.replace(first, targets=targets)
            return [msgspec.structs.replace(first, choice=each) for each in range(num_choices)]

        return self._enter(len(prompts), num_choices, name, admit)

    def score(
        self,
        request_id: str,
        text: str | list[int],
        options: RequestOptions = RequestOptions(),
        *,
        first: int = 1,
        top: int = 0,
        rope: RopeScaling | None = None,
    ) -> Stream:
        """Start the scoring of a text; see score_all."""
        group = self.score_all(request_id, [text], options, first=first, top=top, rope=rope)
        return group.streams[0]

    def score_all(
        self,
        request_id: str,
        texts: Sequence[str | list[int]],
        options: RequestOptions = RequestOptions(),
        *,
        first: int = 1,
        top: int = 0,
        rope: RopeScaling | None = None,
    ) -> StreamGroup:
        """Start the scoring of texts; see Admission.admit_score. When a stream has ended, `scores`
        holds the log-probabilities of its tokens from `first` on; what it generates means nothing.

        Raises RequestError, QueueFull or EngineError.
        """

        def admit(admission: Admission, at: int, called: str) -> list[AddRequest]:
            return [
                admission.admit_score(
                    request_id,
                    texts[at],
                    options,
                    first=first,
                    top=top,
                    name=called,
                    rope=rope,
                )
            ]

        return self._enter(len(texts), 1, "text", admit)

    def _enter(
        self,
        num_prompts: int,
        num_choices: int,
        name: str,
        admit: Callable[[Admission, int, str], list[AddRequest]],
    ) -> StreamGroup:
        """Let in all choices of all prompts, or none. admit: the requests of one prompt, by its
        place and what errors call it."""
        if self._admission is None or self.ready is None:
            raise self.unready or EngineStarting("not started")
        if self._error is not None:
            raise self._error
        self._check_room(num_prompts, num_choices, name)
        news = asyncio.Event()
        group: dict[str, tuple[AddRequest, Stream]] = {}
        for at in range(num_prompts):
            called = f"{name}[{at}]" if num_prompts > 1 else name
            for request in admit(self._admission, at, called):
                request_id = request.request_id
                if num_prompts * num_choices > 1:
                    request_id = f"{request_id}.{at}.{request.choice}"
                if request_id in self._streams:
                    raise ValueError(f"request id {request_id} is in use")
                added = msgspec.structs.replace(request, request_id=request_id)
                group[request_id] = (
                    added,
                    Stream(added, self.tokenizer, self._close_stream, prompt=at, news=news),
                )
        for request_id, (added, stream) in group.items():
            self._streams[request_id] = stream
            self._send(added)
        return StreamGroup([stream for _, stream in group.values()], news)

    def _check_room(self, num_prompts: int, num_choices: int, name: str) -> None:
        """Raises InvalidRequest for more than can ever be taken, QueueFull for more than now."""
        assert self.ready is not None
        limit = -(-(self.ready.max_num_seqs + self._max_queue) // self._num_workers)
        of = (
            f"{limit} (max_num_seqs {self.ready.max_num_seqs} + max_queue {self._max_queue}"
            f"{f', over {self._num_workers} workers' if self._num_workers > 1 else ''})"
        )
        count = num_prompts * num_choices
        if count > limit:
            raise InvalidRequest(
                f"{num_prompts} times {name}, with {num_choices} choices each, are {count} "
                f"sequences; the limit is {of}",
                "n" if num_choices > 1 else name,
            )
        if len(self._streams) + count > limit:
            raise QueueFull(
                f"{len(self._streams)} requests run or wait"
                f"{f' and {count} more are asked for' if count > 1 else ''}; the limit is {of}"
            )

    def pause(self, group: StreamGroup) -> None:
        """Free the pages of a group for now; its streams keep what they have."""
        group.close()

    def resume(self, group: StreamGroup, request_id: str) -> None:
        """Go on with a group that was paused, under another name, either all of it or nothing.

        Raises QueueFull or EngineError.
        """
        if self.ready is None or self._error is not None:
            raise self.unready or EngineStarting("not started")
        streams = [stream for stream in group.streams if stream.finish_reason is None]
        self._check_room(len(streams), 1, "prompt")
        for number, stream in enumerate(streams):
            request = stream.renew(f"{request_id}.{number}")
            self._streams[stream.request_id] = stream
            self._send(request)

    def restore(
        self,
        states: Sequence[StreamState],
        tokens: Sequence[Sequence[tuple[int, TokenLogprobs | None]]],
    ) -> StreamGroup:
        """A paused group that another process had. tokens: of each stream, as it had come."""
        news = asyncio.Event()
        streams = [
            Stream.restored(state, some, self.tokenizer, self._close_stream, news)
            for state, some in zip(states, tokens, strict=True)
        ]
        return StreamGroup(streams, news)

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
                # Before anything is waited for: we may be cancelled there.
                self._connection = None
                connection.close()
                await asyncio.gather(receiving, lost, return_exceptions=True)
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
        if stream.finish_reason is not None or output.error is not None:
            del self._streams[output.request_id]
            if not output.last:  # a stop string, which only this side knows of
                self._send(AbortRequest(output.request_id))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """No stream may wait for a task that is gone."""
        if not task.cancelled() and (fault := task.exception()) is not None:
            logger.error("the connection to the engine broke", exc_info=fault)
            self.fail(EngineDead(f"the connection to the engine broke: {fault!r}"))
