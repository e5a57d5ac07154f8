"""What the routes share: the engine, its metrics, and whether new work is taken."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Self

import msgspec
from fastapi import Depends, Request

from engine.errors import Draining, EngineError, RopewayError
from engine.frontend.client import AsyncEngine
from engine.frontend.stream import Piece, Stream, StreamGroup
from engine.params import RequestOptions, SamplingParams
from engine.scaling import RopeScaling
from server.access.caller import Caller, caller_of
from server.chat import ChatTemplate
from server.metrics import Metrics
from server.settings import ServerSettings


class Generation:
    """One answer on its way: streams that are measured, and closed when left.

    `async with generation: async for pieces in generation: ...`
    """

    def __init__(self, group: StreamGroup, metrics: Metrics, caller: Caller) -> None:
        """group: fresh from the engine. caller: told what it has started."""
        self.streams = caller.streams = group.streams
        self.group = group
        self._caller = caller
        self._metrics = metrics
        self._last: dict[Stream, float] = {}
        self._failed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Piece]:
        try:
            pieces = await self.group.__anext__()
        except EngineError as error:
            self._failed = True
            self._caller.failure = error.code
            raise
        now = time.monotonic()
        for piece in pieces:
            if piece.deltas:
                self._observe(piece, now)
        return pieces

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.group.close()
        metrics = self._metrics
        for stream in self.streams:
            timing, usage = stream.timing, stream.usage
            if timing.total is not None:
                metrics.duration.observe(timing.total)
                metrics.prompt_tokens.observe(usage.prompt_tokens)
                metrics.generation_tokens.observe(usage.completion_tokens)
                if timing.first_token is not None:
                    metrics.decode_time.observe(timing.total - timing.first_token)
            outcome = stream.finish_reason or ("error" if self._failed else "aborted")
            metrics.requests.labels(outcome).inc()

    def _observe(self, piece: Piece, now: float) -> None:
        last = self._last.get(piece.stream)
        if last is None:
            timing = piece.stream.timing
            if timing.first_token is not None:
                self._metrics.first_token.observe(timing.first_token)
            if timing.queue is not None and timing.prefill is not None:
                self._metrics.queue_time.observe(timing.queue)
                self._metrics.prefill_time.observe(timing.prefill)
        else:
            gap = (now - last) / len(piece.deltas)
            for _ in piece.deltas:
                self._metrics.inter_token.observe(gap)
        self._last[piece.stream] = now


class Service:
    """One HTTP process's share of the work."""

    def __init__(self, engine: AsyncEngine, chat: ChatTemplate, settings: ServerSettings) -> None:
        """engine: may be starting still. chat: makes prompts of conversations."""
        self.engine = engine
        self.chat = chat
        self.started = int(time.time())
        self.settings = settings
        shared_dir = None if settings.shared_dir is None else Path(settings.shared_dir)
        self.metrics = Metrics(engine, shared_dir)
        self._draining = False

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self._draining = True

    def check_ready(self) -> None:
        """Raises the EngineError that keeps this process from serving, if there is one."""
        if self._draining and self.engine.alive:
            raise Draining("the server is shutting down and takes no new requests")
        if (reason := self.engine.unready) is not None:
            raise reason

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
        num_choices: int = 1,
        *,
        caller: Caller,
        name: str = "prompt",
        score_prompts: bool = False,
    ) -> Generation:
        """Start a request; see AsyncEngine.submit_all.

        A caller with a key shares cached prompts with nobody else, unless the operator says so.
        Raises RequestError, QueueFull or EngineError.
        """
        options = self._salted(options, caller)
        return self._start(
            caller,
            prompts,
            lambda request_id: self.engine.submit_all(
                request_id,
                prompts,
                params,
                options,
                num_choices,
                name=name,
                score_prompts=score_prompts,
            ),
        )

    def score(
        self,
        texts: Sequence[str | list[int]],
        options: RequestOptions,
        *,
        caller: Caller,
        first: int,
        top: int,
        rope: RopeScaling | None,
    ) -> Generation:
        """Score texts; see AsyncEngine.score_all. Raises as generate() does."""
        options = self._salted(options, caller)
        return self._start(
            caller,
            texts,
            lambda request_id: self.engine.score_all(
                request_id, texts, options, first=first, top=top, rope=rope
            ),
        )

    def _salted(self, options: RequestOptions, caller: Caller) -> RequestOptions:
        if caller.key is None or self.settings.share_prefix_cache:
            return options
        salt = caller.key.salt(options.cache_salt)
        return msgspec.structs.replace(options, cache_salt=salt)

    def _start(
        self,
        caller: Caller,
        prompts: Sequence[str | list[int]],
        submit: Callable[[str], StreamGroup],
    ) -> Generation:
        if self.settings.log_prompts:
            caller.prompts = list(prompts)
        try:
            self.check_ready()
            # Not the client's X-Request-Id, which need not be unique.
            group = submit(uuid.uuid4().hex)
        except RopewayError as error:
            self.metrics.requests.labels(error.code).inc()
            raise
        return self.generation(group, caller)

    def generation(self, group: StreamGroup, caller: Caller) -> Generation:
        """A group, measured."""
        return Generation(group, self.metrics, caller)


async def _service(request: Request) -> Service:
    """Asynchronous, since FastAPI would run a plain function in a thread."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]


async def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


CallerDep = Annotated[Caller, Depends(_caller)]
