"""A whole answer at once, where it is not to be streamed."""

from __future__ import annotations

from fastapi import Request, Response
from pydantic import BaseModel

from engine.frontend.output import TokenDelta
from engine.frontend.stream import Stream
from server.connection import Disconnected, while_connected
from server.service import Generation

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has gone; nobody reads it."""

Outputs = list[tuple[Stream, list[TokenDelta]]]


async def collect(generation: Generation, request: Request) -> Outputs | None:
    """Every stream with all its tokens; None where the client went, which aborts them.

    Raises EngineError.
    """
    async with generation:
        try:
            return await while_connected(request.receive, _gather(generation))
        except Disconnected:
            return None


async def _gather(generation: Generation) -> Outputs:
    deltas: dict[Stream, list[TokenDelta]] = {stream: [] for stream in generation.streams}
    async for pieces in generation:
        for piece in pieces:
            deltas[piece.stream] += piece.deltas
    return list(deltas.items())


def json_response(body: BaseModel) -> Response:
    """Without what was not asked for, and not for caches."""
    return Response(
        body.model_dump_json(exclude_unset=True),
        headers={"Cache-Control": "no-store"},
        media_type="application/json",
    )
