"""/v1: what OpenAI's clients call."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from engine.messages import EngineReady
from server.collect import CLIENT_CLOSED_REQUEST, collect
from server.content import require_json
from server.errors import OPENAI_DOCUMENTED, ApiError, OpenAIErrorBody
from server.openai.answers import ChatCompletion, Completion, Model, ModelList
from server.openai.events import ChatEvents, CompletionEvents
from server.openai.schemas import ChatRequest, CompletionRequest, OpenAIRequest
from server.schemas import prompts_of
from server.service import CallerDep, Generation, Service, ServiceDep
from server.sse import EVENT_SCHEMA, EventStream

router = APIRouter(prefix="/v1", tags=["OpenAI"])


def _success(body: type) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "model": body,
            "description": "One JSON body; or server-sent events where `stream` is true, which end "
            "by [DONE], or by a chunk with an `error`.",
            "content": {"text/event-stream": {"schema": dict(EVENT_SCHEMA)}},
        }
    }


def served_model(service: Service, model: str | None = None) -> EngineReady:
    """What is served. Raises EngineError; ApiError for a model that it is not."""
    service.check_ready()
    ready = service.engine.ready
    assert ready is not None
    if model is not None and model != ready.model:
        raise ApiError(
            HTTPStatus.NOT_FOUND,
            "model_not_found",
            f"model {model!r} is not served here; {ready.model!r} is",
            "model",
        )
    return ready


def _model(service: Service, model: str | None = None) -> Model:
    ready = served_model(service, model)
    return Model(id=ready.model, created=service.started, max_model_len=ready.context)


@router.get("/models", responses={503: {"model": OpenAIErrorBody}})
async def models(service: ServiceDep) -> ModelList:
    """The one model that is served."""
    return ModelList([_model(service)])


@router.get(
    "/models/{model}",
    responses={status: {"model": OpenAIErrorBody} for status in (404, 503)},
)
async def model(model: str, service: ServiceDep) -> Model:
    """One model."""
    return _model(service, model)


@router.post(
    "/completions",
    response_class=Response,
    responses=_success(Completion) | OPENAI_DOCUMENTED,
    dependencies=[Depends(require_json)],
)
async def completions(
    body: CompletionRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """Continue a prompt, as OpenAI's completions do."""
    ready = served_model(service, body.model)
    body.check()
    num_choices = body.num_choices()
    generation = service.generate(
        prompts_of(body.prompt),
        body.to_params(),
        body.to_options(),
        num_choices,
        caller=caller,
        score_prompts=body.echo and body.logprobs is not None,
    )
    events = CompletionEvents(
        caller.request_id,
        ready.model,
        generation.streams,
        num_choices,
        service.engine.tokenizer,
        include_usage=body.include_usage,
        echo=body.echo,
        logprobs=body.logprobs is not None,
        prompt_only=body.prompt_only,
    )
    return await _answer(body, request, service, generation, events)


@router.post(
    "/chat/completions",
    response_class=Response,
    responses=_success(ChatCompletion) | OPENAI_DOCUMENTED,
    dependencies=[Depends(require_json)],
)
async def chat(
    body: ChatRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """Answer a conversation; the model's chat template makes a prompt of it."""
    ready = served_model(service, body.model)
    body.check()
    params = body.to_params()
    if body.max_completion_tokens is not None:
        params = msgspec.structs.replace(params, max_tokens=body.max_completion_tokens)
    if not params.stop:
        params = msgspec.structs.replace(params, stop=service.chat.stop)
    num_choices = body.num_choices()
    prompt = service.chat.token_ids(body.conversation())
    generation = service.generate(
        [prompt], params, body.to_options(), num_choices, caller=caller, name="messages"
    )
    events = ChatEvents(
        caller.request_id,
        ready.model,
        generation.streams,
        num_choices,
        service.engine.tokenizer,
        include_usage=body.include_usage,
    )
    return await _answer(body, request, service, generation, events)


async def _answer(
    body: OpenAIRequest,
    request: Request,
    service: Service,
    generation: Generation,
    events: CompletionEvents | ChatEvents,
) -> Response:
    """A stream, or all in one body."""
    if body.stream:
        return EventStream(generation, events, service.settings.keep_alive_seconds)
    outputs = await collect(generation, request)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(
        events.body(outputs), headers={"Cache-Control": "no-store"}, media_type="application/json"
    )
