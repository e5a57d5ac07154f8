"""POST /generate."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from server.answers import GenerateManyResponse, GenerateResponse, answer
from server.collect import CLIENT_CLOSED_REQUEST, collect, json_response
from server.content import require_json
from server.errors import DOCUMENTED
from server.events import GenerateEvents
from server.schemas import GenerateRequest, prompts_of
from server.service import CallerDep, ServiceDep
from server.sse import EventStream

SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerateResponse | GenerateManyResponse,
        "description": "Server-sent events, or one JSON body where `stream` is false. Events: "
        "`token` with `id:` the token's index (`prompt.choice.index` where there are several, and "
        "`finish` after each); then `done`, or `error` if it could not finish.",
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
async def generate(
    body: GenerateRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """Stream the tokens that follow a prompt; leaving early aborts the request."""
    generation = service.generate(
        prompts_of(body.prompt),
        body.to_params(),
        body.to_options(),
        body.num_choices(),
        caller=caller,
    )
    tokenizer = service.engine.tokenizer
    if body.stream:
        events = GenerateEvents(generation.streams, tokenizer, echo=body.echo)
        return EventStream(generation, events, service.settings.keep_alive_seconds)
    outputs = await collect(generation, request)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return json_response(answer(caller.request_id, outputs, tokenizer, echo=body.echo))
