"""The id of a request, in and out."""

from __future__ import annotations

import re
import uuid
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.caller import Caller
from server.errors import error_response

HEADER = "X-Request-Id"
MAX_LENGTH = 128
_VALID = re.compile(rf"[A-Za-z0-9._:/+=@-]{{1,{MAX_LENGTH}}}")


class RequestIds:
    """Takes a client's X-Request-Id or makes one, and says it in every answer.

    All that follows finds it by caller_of().
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER)
        request_id = uuid.uuid4().hex if given is None else given
        valid = _VALID.fullmatch(request_id) is not None

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start" and valid:
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        scope.setdefault("state", {})["caller"] = Caller(request_id)
        if not valid:
            response = error_response(
                HTTPStatus.BAD_REQUEST,
                "invalid_request_id",
                f"{HEADER} must have 1 to {MAX_LENGTH} letters, digits or ._:/+=@-, got "
                f"{request_id[:MAX_LENGTH]!r}{'...' if len(request_id) > MAX_LENGTH else ''}",
                scope=scope,
            )
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send_named)
