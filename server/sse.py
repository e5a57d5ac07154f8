"""Server-sent events of one generation.

    id: 0
    event: token
    data: {"index":0,"token_id":318,"text":" was"}

`event: done` ends a stream that succeeded, `event: error` one that could not finish. Tokens that
came together are joined in one write, so a slow reader costs fewer writes, not more memory.

A response of our own, since those at hand do not fit: Starlette's StreamingResponse and FastAPI's
EventSourceResponse pass every event through a task and a memory stream; sse-starlette ends streams
when the server is told to stop (ours drain first) and takes a lock and a cancel scope per event.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from engine.frontend.output import TokenDelta
from engine.frontend.tokenizer import Tokenizer
from server.connection import Disconnected, while_connected
from server.schemas import DoneEvent, ErrorEvent, TokenEvent
from server.service import Generation

KEEP_ALIVE = b": waiting\n\n"


def token_event(delta: TokenDelta, tokenizer: Tokenizer) -> bytes:
    """One token as it goes over the wire."""
    data = TokenEvent.of(delta, tokenizer).model_dump_json(exclude_unset=True)
    return f"id: {delta.index}\nevent: token\ndata: {data}\n\n".encode()


def last_event(name: str, data: BaseModel) -> bytes:
    """`done` or `error`; without an id, so that the last token's id stays the last."""
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()


class EventStream(Response):
    """The ASGI response that streams a generation."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, tokenizer: Tokenizer, keep_alive: float) -> None:
        """keep_alive: seconds of silence after which a comment is sent."""
        self.status_code = 200
        self.background = None
        self.init_headers(
            {
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                "X-Request-Id": generation.stream.request_id,
            }
        )
        self._generation = generation
        self._tokenizer = tokenizer
        self._keep_alive = keep_alive
        self._writes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end or until the client goes, which aborts the generation."""
        async with self._generation:
            with suppress(Disconnected):
                await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        comments = asyncio.create_task(self._comment(send))
        try:
            async for deltas in self._generation:
                events = b"".join(token_event(delta, self._tokenizer) for delta in deltas)
                await self._write(send, events)
            end = last_event("done", DoneEvent.of(self._generation.stream))
        except EngineError as error:
            end = last_event("error", ErrorEvent(code=error.code, message=str(error)))
        finally:
            comments.cancel()
        await self._write(send, end, more=False)

    async def _write(self, send: Send, body: bytes, *, more: bool = True) -> None:
        """Waits while the client does not read; what is generated meanwhile joins up."""
        self._writes += 1
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def _comment(self, send: Send) -> None:
        """Break long silences, so that no proxy takes the stream for dead."""
        while True:
            writes = self._writes
            await asyncio.sleep(self._keep_alive)
            if self._writes == writes:
                await self._write(send, KEEP_ALIVE)
