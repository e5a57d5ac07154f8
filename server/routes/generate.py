"""POST /generate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from engine.frontend.tokenizer import Tokenizer
from server.connection import Disconnected, while_connected
from server.content import require_json
from server.errors import DOCUMENTED
from server.schemas import GenerateRequest, GenerateResponse
from server.service import Generation, ServiceDep
from server.sse import EventStream

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that has gone; nobody reads it."""

SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerateResponse,
        "description": "Server-sent events, or one JSON body where `stream` is false. Events: "
        "`token` with `id:` the token's index; then `done`, or `error` if it could not finish.",
        "content": {
            "text/event-stream": {
                "schema": {"type": "string"},
                "example": 'id: 0\nevent: token\ndata: {"index":0,"token_id":318,"text":" on"}\n\n',
            }
        },
    }
}

router = APIRouter(tags=["generate"])


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_class=Response,
    responses=SUCCESS | DOCUMENTED,
    dependencies=[Depends(require_json)],
)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep) -> Response:
    """Stream the tokens that follow a prompt; leaving early aborts the request."""
    generation = service.generate(body.prompt, body.to_params(), body.to_options())
    tokenizer = service.engine.tokenizer
    if body.stream:
        return EventStream(generation, tokenizer, service.settings.keep_alive_seconds)
    async with generation:
        try:
            answer = await while_connected(request.receive, _collect(generation, tokenizer))
        except Disconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(
        answer.model_dump_json(exclude_unset=True),
        headers={"X-Request-Id": answer.request_id, "Cache-Control": "no-store"},
        media_type="application/json",
    )


async def _collect(generation: Generation, tokenizer: Tokenizer) -> GenerateResponse:
    """The whole output. Raises EngineError."""
    deltas = [delta async for some in generation for delta in some]
    return GenerateResponse.of(generation.stream, deltas, tokenizer)
