"""Every error as one JSON shape: {"error": {"code", "message", "field"}}.

Under /v1/ it is OpenAI's: {"error": {"message", "type", "param", "code"}}, and a fault in a field
is a 400, as their clients expect; `code` is the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Scope

from engine.errors import (
    Draining,
    EngineError,
    EngineStarting,
    PoisonedRequest,
    QueueFull,
    RequestError,
    RopewayError,
)
from server.access.caller import caller_of, note_failure

OPENAI_PATH = "/v1/"
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_SECONDS = 1
SHOWN_CHARACTERS = 80


class ErrorDetail(BaseModel):
    """`code` is stable and for programs; `message` is for people; `field` is the guilty one."""

    code: str
    message: str
    field: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class OpenAIErrorDetail(BaseModel):
    """`code` is that of the same error elsewhere; `param` is the guilty field."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorBody(BaseModel):
    """The same under /v1/, in OpenAI's shape."""

    error: OpenAIErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The body is not JSON.",
        401: "The server needs an API key, and this is none.",
        413: "The body is too large.",
        415: "The body is not said to be JSON.",
        409: "X-Request-Id names a stream that can still be resumed.",
        422: "A field is unknown, of the wrong type or out of range, or the context is too short.",
        429: "Too many requests wait already, or the key has used up what it may; Retry-After says "
        "when to try again.",
        500: "A fault of the server; or the engine died of this request, also alone.",
        503: "The engine is starting or gone, or the server is shutting down.",
    }.items()
}
"""For `responses=` of routes that take a body."""

OPENAI_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    status: {"model": OpenAIErrorBody, "description": description["description"]}
    for status, description in DOCUMENTED.items()
    if status != HTTPStatus.UNPROCESSABLE_ENTITY
} | {
    400: {"model": OpenAIErrorBody, "description": "No JSON, or a field that is not right."},
    404: {"model": OpenAIErrorBody, "description": "Another model is served."},
}
"""The same for those under /v1/."""


class ApiError(HTTPException):
    """An error of HTTP itself, with a code of its own."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        message: str,
        field: str | None = None,
    ) -> None:
        super().__init__(status, message)
        self.code = code
        self.field = field


def error_response(
    status: int,
    code: str,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    scope: Scope,
) -> Response:
    """The one shape, or OpenAI's where the path asks for that; noted for the log. ASCII only: a
    message may quote what no UTF-8 can hold."""
    note_failure(scope, code)
    error: dict[str, str | None] = {"code": code, "message": message, "field": field}
    if scope["path"].startswith(OPENAI_PATH):
        if status == HTTPStatus.UNPROCESSABLE_ENTITY:
            status = HTTPStatus.BAD_REQUEST
        error = openai_error(status, code, message, field)
    body = json.dumps({"error": error})
    return Response(body, status, headers, media_type="application/json")


def openai_error(
    status: int, code: str, message: str, field: str | None = None
) -> dict[str, str | None]:
    """What OpenAI's clients read."""
    kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"message": message, "type": kind, "param": field, "code": code}


def status_of(error: RopewayError) -> int:
    """The HTTP status that says whose fault an error is."""
    if isinstance(error, RequestError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    if isinstance(error, QueueFull):
        return HTTPStatus.TOO_MANY_REQUESTS
    if isinstance(error, PoisonedRequest):
        return HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, EngineError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR


def ropeway_response(error: RopewayError, scope: Scope) -> Response:
    """The answer to an error of the engine's tree."""
    again = isinstance(error, QueueFull | EngineStarting | Draining)
    return error_response(
        status_of(error),
        error.code,
        str(error),
        error.field if isinstance(error, RequestError) else None,
        {"Retry-After": str(RETRY_SECONDS)} if again else None,
        scope=scope,
    )


def install(app: FastAPI) -> None:
    """Answer every exception in the one shape."""

    async def on_ropeway(request: Request, error: Exception) -> Response:
        assert isinstance(error, RopewayError)
        return ropeway_response(error, request.scope)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _validation_response(error, request.scope)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, field = _code(error.status_code), None
        if isinstance(error, ApiError):
            code, field = error.code, error.field
        return error_response(
            error.status_code, code, error.detail, field, error.headers, scope=request.scope
        )

    async def on_bug(request: Request, _: Exception) -> Response:
        # Starlette raises it again after this answer, so that the log has the traceback.
        return error_response(
            500,
            "internal_error",
            "internal error; the server's log says more",
            headers={"X-Request-Id": caller_of(request.scope).request_id},
            scope=request.scope,
        )

    app.add_exception_handler(RopewayError, on_ropeway)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def _code(status: int) -> str:
    return re.sub(r"[^a-z]+", "_", HTTPStatus(status).phrase.lower())


def _validation_response(error: RequestValidationError, scope: Scope) -> Response:
    """Name the first fault: its field and its value."""
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        at = fault["loc"][-1]
        message = f"the body is not valid JSON: {fault['ctx']['error']} at character {at}"
        return error_response(HTTPStatus.BAD_REQUEST, "invalid_json", message, scope=scope)
    field = _path(fault["loc"][1:])
    match fault["type"]:
        case "unsupported":
            field, message = fault["ctx"]["field"], fault["msg"]
        case "string_unicode" if not field:
            message = f"{_shown(fault['input'])} is not a field of this request"
        case _ if not field:
            message = "the body must be a JSON object"
        case "missing":
            message = f"{field} is required"
        case "extra_forbidden":
            message = f"{field} is not a field of this request"
        case _:
            reason = fault["msg"].removeprefix("Input ")
            message = f"{field} {reason}, got {_shown(fault['input'])}"
    return error_response(
        HTTPStatus.UNPROCESSABLE_ENTITY, "invalid_request", message, field or None, scope=scope
    )


def _path(location: tuple[str | int, ...]) -> str:
    """('stop', 2) -> stop[2]"""
    return "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in location
    ).removeprefix(".")


def _shown(value: object) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
