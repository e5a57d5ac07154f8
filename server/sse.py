"""Server-sent events of one answer.

Tokens that came together are joined in one write, so a slow reader costs fewer writes, not more
memory.

A response of our own, since those at hand do not fit: Starlette's StreamingResponse and FastAPI's
EventSourceResponse pass every event through a task and a memory stream; sse-starlette ends streams
when the server is told to stop (ours drain first) and takes a lock and a cancel scope per event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from engine.frontend.output import TokenDelta
from engine.frontend.stream import Piece, Stream
from server.connection import Disconnected, while_connected

KEEP_ALIVE = b": waiting\n\n"

EVENT_SCHEMA: Mapping[str, Any] = MappingProxyType(
    {
        "type": "object",
        "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
        "required": ["data"],
    }
)
"""Of one event, as OpenAPI describes streams of them."""


class Events(Protocol):
    """How an answer is written. Empty bytes: nothing is."""

    def begin(self) -> bytes:
        """Before the first token."""

    def tokens(self, stream: Stream, deltas: Sequence[TokenDelta]) -> bytes:
        """Tokens of one of its streams."""

    def finish(self, stream: Stream) -> bytes:
        """One of its streams is complete."""

    def end(self) -> bytes:
        """All are complete; nothing follows."""

    def error(self, error: EngineError) -> bytes:
        """It could not finish; nothing follows, and it must not look like end()."""


class Source(Protocol):
    """What is streamed: a Generation, which is aborted when left, or a Reader of a session."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(self, *_: object) -> None: ...

    def __aiter__(self) -> AsyncIterator[Sequence[Piece]]: ...


class EventStream(Response):
    """The ASGI response that streams a generation."""

    media_type = "text/event-stream"

    def __init__(
        self, source: Source, events: Events, keep_alive: float, *, begin: bool = True
    ) -> None:
        """source: left when the client goes; keep_alive: seconds of silence after which a comment
        is sent; begin: this is the answer's beginning."""
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._source = source
        self._begin = begin
        self._events = events
        self._keep_alive = keep_alive
        self._writes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end or until the client goes."""
        async with self._source:
            with suppress(Disconnected):
                await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        comments = asyncio.create_task(self._comment(send))
        events = self._events
        try:
            if self._begin:
                await self._write(send, events.begin())
            async for pieces in self._source:
                parts = []
                for piece in pieces:
                    parts.append(events.tokens(piece.stream, piece.deltas))
                    if piece.ended:
                        parts.append(events.finish(piece.stream))
                await self._write(send, b"".join(parts))
            end = events.end()
        except EngineError as error:
            end = events.error(error)
        finally:
            comments.cancel()
        await self._write(send, end, more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Waits while the client does not read; what is generated meanwhile joins up."""
        if body or not more:
            self._writes += 1
            await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _comment(self, send: Send) -> None:
        """Break long silences, so that no proxy takes the stream for dead."""
        while True:
            writes = self._writes
            await asyncio.sleep(self._keep_alive)
            if self._writes == writes:
                await self._write(send, KEEP_ALIVE)
