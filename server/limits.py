"""The limit on a request's body."""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, error_response

CODE = "body_too_large"


class BodyLimit:
    """Refuses a body over the limit: at once where its length is declared, else as it arrives.

    FastAPI's own `max_body_size` answers with a plain text that names no limit.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """max_bytes: the largest body that is let in."""
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length")
        if declared is not None and int(declared) > self._max_bytes:
            response = error_response(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                CODE,
                self._message(declared),
                scope=scope,
            )
            await response(scope, receive, send)
            return
        size = 0

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, CODE, self._message("more than that")
                )
            return message

        await self._app(scope, receive_counted, send)

    def _message(self, size: str) -> str:
        return f"the body can have at most {self._max_bytes} bytes, got {size}"
