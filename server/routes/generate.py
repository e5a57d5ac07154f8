"""POST /generate."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request, Response

from server.answers import GenerateManyResponse, GenerateResponse, answer
from server.collect import CLIENT_CLOSED_REQUEST, collect, json_response
from server.content import require_json
from server.errors import DOCUMENTED, ErrorBody
from server.events import GenerateEvents
from server.schemas import GenerateRequest, prompts_of
from server.service import CallerDep, ServiceDep
from server.session import LAST_EVENT_ID, Session
from server.sessions import Sessions
from server.sse import EVENT_SCHEMA, EventStream, Source

SUCCESS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": GenerateResponse | GenerateManyResponse,
        "description": "Server-sent events, or one JSON body where `stream` is false. Events: "
        "`token` with `id:` the token's index (`prompt.choice.index` where there are several, and "
        "`finish` after each); then `done`, or `error` if it could not finish.",
        "content": {
            "text/event-stream": {
                "schema": dict(EVENT_SCHEMA),
                "example": {
                    "id": "0",
                    "event": "token",
                    "data": '{"index":0,"token_id":318,"text":" on"}',
                },
            }
        },
    }
}

RESUMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The events after the last one that was seen, and those that follow.",
        "content": {"text/event-stream": {"schema": dict(EVENT_SCHEMA)}},
    },
    404: {"model": ErrorBody, "description": "No stream of this id and key can be resumed."},
    **{status: DOCUMENTED[status] for status in (400, 401, 422, 429, 503)},
}


async def _sessions(request: Request) -> Sessions:
    sessions = request.app.state.sessions
    assert isinstance(sessions, Sessions)
    return sessions


SessionsDep = Annotated[Sessions, Depends(_sessions)]
router = APIRouter(tags=["generate"])


@router.post(
    "/generate",
    summary="Continue a prompt",
    response_class=Response,
    responses=SUCCESS | DOCUMENTED,
    dependencies=[Depends(require_json)],
)
async def generate(
    body: GenerateRequest,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    sessions: SessionsDep,
) -> Response:
    """Stream the tokens that follow a prompt; leaving early aborts the request, or with
    `--resume-window` only pauses it."""
    resumable = body.stream and service.settings.resume_window > 0
    if resumable:
        sessions.check_free(caller)
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
        source: Source = generation
        if resumable:
            source = sessions.open(caller, Session(service.engine, generation, echo=body.echo))
        return EventStream(source, events, service.settings.keep_alive_seconds)
    outputs = await collect(generation, request)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return json_response(answer(caller.request_id, outputs, tokenizer, echo=body.echo))


@router.get(
    "/generate/{request_id}",
    summary="Go on with a stream",
    response_class=Response,
    responses=RESUMED,
)
async def resume(
    request_id: str,
    service: ServiceDep,
    caller: CallerDep,
    sessions: SessionsDep,
    last_event_id: Annotated[str | None, Header(alias=LAST_EVENT_ID)] = None,
) -> Response:
    """Where `--resume-window` keeps the streams of lost clients: what came after an event, and
    what follows. `request_id` is the X-Request-Id of the stream's own answer."""
    session, reader = await sessions.resume(caller, request_id, last_event_id)
    events = GenerateEvents(session.generation.streams, service.engine.tokenizer, echo=session.echo)
    keep_alive = service.settings.keep_alive_seconds
    return EventStream(reader, events, keep_alive, begin=last_event_id is None)
