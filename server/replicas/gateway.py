"""What clients of several replicas talk to: it passes requests on, and asks again where one dies.

It knows replicas by their handle only: `handle.respond.remote(call)` is an asynchronous iterator of
a Head and the pieces of a body, with cancel(). So it is tested without Ray.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from engine.errors import Draining, EngineDead, EngineStartError, EngineStarting
from server.answers import ErrorEvent
from server.errors import error_response
from server.events import named_event
from server.replicas.call import Call, Head, prepared, timed
from server.replicas.splice import Diverged, Splice

PAUSE_SECONDS = 0.1
"""Before the second replica is asked; twice as long before each further one."""

AGAIN = {each.code for each in (EngineDead, EngineStartError, EngineStarting, Draining)}
"""Codes of errors that say that this replica cannot, and not that the request cannot."""

logger = logging.getLogger(__name__)


class Lost(Exception):
    """An attempt came to nothing, and another replica may do better; says why."""


class InVain(Exception):
    """As many replicas as may be were asked; says what the last one did."""


class Gateway:
    """What clients talk to."""

    def __init__(self, replicas: Any, attempts: int, failures: tuple[type[Exception], ...]) -> None:
        """attempts: replicas asked at most; failures: what the answer of a dead one raises."""
        self._replicas = replicas
        self._attempts = attempts
        self._failures = failures

    async def __call__(self, request: Request) -> Response:
        """Pass a request on and its answer back, whatever becomes of a replica."""
        call = Call(
            method=request.method,
            path=request.scope["path"],
            headers=tuple(request.headers.raw),
            body=await request.body(),
        )
        if call.path == "/metrics":
            return error_response(
                404, "not_found", "Ray exports the metrics of its replicas", scope=request.scope
            )
        asking = Asking(self._replicas, prepared(call), self._attempts, self._failures)
        try:
            while True:
                head = await asking.begin()
                if head.streams:
                    return StreamingResponse(stream(asking), head.status, head.kept)
                try:
                    body = b"".join([piece async for piece in asking.body()])
                except Lost as lost:
                    asking.lost = lost
                    continue
                return Response(body, head.status, head.kept)
        except InVain as error:
            return error_response(
                503, "no_replica", str(error), None, {"Retry-After": "1"}, scope=request.scope
            )


class Asking:
    """One request and the replicas that are asked for it, one after the other."""

    def __init__(
        self, replicas: Any, call: Call, attempts: int, failures: tuple[type[Exception], ...]
    ) -> None:
        """As Gateway has them. Nobody is asked yet."""
        self._failures = failures
        self._replicas = replicas
        self._call = call
        self._attempts = attempts
        self._asked = 0
        self._began = time.monotonic()
        self._answer: Any = None
        self.lost: Lost | None = None

    async def begin(self) -> Head:
        """Ask replicas until one of them begins to answer. Raises InVain."""
        while self._asked < self._attempts:
            if self._asked:
                logger.warning("%s; asking another replica", self.lost)
                self.close()
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (self._asked - 1))
            self._asked += 1
            elapsed = time.monotonic() - self._began
            self._answer = self._replicas.respond.remote(timed(self._call, elapsed))
            try:
                head = await self._next()
            except Lost as lost:
                self.lost = lost
                continue
            if isinstance(head, Head) and head.status != HTTPStatus.SERVICE_UNAVAILABLE:
                return head
            self.lost = Lost("a replica could not serve")
        raise InVain(f"{self._asked} replicas were asked in vain; at last: {self.lost}")

    async def body(self) -> AsyncIterator[bytes]:
        """What comes after the head. Raises Lost."""
        while (piece := await self._next()) is not None:
            assert isinstance(piece, bytes)
            yield piece

    def close(self) -> None:
        """Nobody wants the rest: the replica aborts the request."""
        if self._answer is not None:
            self._answer.cancel()

    async def _next(self) -> Head | bytes | None:
        try:
            piece: Head | bytes | None = await anext(self._answer, None)
            return piece
        except self._failures as error:
            raise Lost(f"a replica failed by {type(error).__name__}") from error


async def stream(asking: Asking) -> AsyncIterator[bytes]:
    """The body of a stream whose head was read; an `error` event where it cannot be finished."""
    splice = Splice()
    try:
        while True:
            try:
                async for piece in asking.body():
                    for event in splice.feed(piece):
                        if (code := error_code(event)) in AGAIN:
                            raise Lost(f"a stream ended by {code}")
                        yield event
                if splice.ended:
                    return
                raise Lost("a stream had no end")
            except Lost as lost:
                asking.lost = lost
            splice.again()
            while not (head := await asking.begin()).streams:
                asking.lost = Lost(f"a replica refused with status {head.status}")
    except Diverged as error:
        yield named_event("error", ErrorEvent(code="diverged", message=str(error)))
    except InVain as error:
        yield named_event("error", ErrorEvent(code="no_replica", message=str(error)))
    finally:
        asking.close()


def error_code(event: bytes) -> str | None:
    """Of an `error` event; None of any other."""
    kind, _, data = event.partition(b"\ndata: ")
    return str(json.loads(data)["code"]) if kind == b"event: error" else None
