"""What the routes share: the engine, its metrics, and whether new work is taken."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Self

from fastapi import Depends, Request

from engine.errors import Draining, EngineError, RopewayError
from engine.frontend.client import AsyncEngine, Stream
from engine.frontend.output import TokenDelta
from engine.request import RequestOptions, SamplingParams
from server.metrics import Metrics
from server.settings import ServerSettings


class Generation:
    """One request on its way: a Stream that is measured, and closed when left.

    `async with generation: async for deltas in generation: ...`
    """

    def __init__(self, stream: Stream, metrics: Metrics) -> None:
        """stream: fresh from the engine."""
        self.stream = stream
        self._metrics = metrics
        self._last: float | None = None
        self._failed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        try:
            deltas = await self.stream.__anext__()
        except EngineError:
            self._failed = True
            raise
        self._observe(len(deltas))
        return deltas

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stream.close()
        timing = self.stream.timing
        if timing.total is not None:
            self._metrics.duration.observe(timing.total)
        outcome = "error" if self._failed else self.stream.finish_reason or "aborted"
        self._metrics.requests.labels(outcome).inc()

    def _observe(self, num_tokens: int) -> None:
        now = time.monotonic()
        if self._last is None:
            timing = self.stream.timing
            if timing.first_token is not None:
                self._metrics.first_token.observe(timing.first_token)
            if timing.queue is not None:
                self._metrics.queue_time.observe(timing.queue)
        else:
            for _ in range(num_tokens):
                self._metrics.inter_token.observe((now - self._last) / num_tokens)
        self._last = now


class Service:
    """One HTTP process's share of the work."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings) -> None:
        """engine: may be starting still."""
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
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
        prompt: str | list[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
    ) -> Generation:
        """Start a request. Raises RequestError, QueueFull or EngineError."""
        try:
            self.check_ready()
            stream = self.engine.submit(uuid.uuid4().hex, prompt, params, options)
        except RopewayError as error:
            self.metrics.requests.labels(error.code).inc()
            raise
        return Generation(stream, self.metrics)


async def _service(request: Request) -> Service:
    """Asynchronous, since FastAPI would run a plain function in a thread."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


ServiceDep = Annotated[Service, Depends(_service)]
