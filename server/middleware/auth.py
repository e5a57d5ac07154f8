"""Who may ask: API keys before everything but probes and documents."""

from __future__ import annotations

import math
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.caller import caller_of
from server.access.keys import KeyRing
from server.access.quota import Quota
from server.errors import error_response

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
OPEN_FOLDER = "/static/"
SCHEME = "bearer"


class Authentication:
    """Lets in who has a key, within its limits. The caller has the key then.

    A path that is not known to be open needs a key, so that no route is open by mistake.
    """

    def __init__(self, app: ASGIApp, ring: KeyRing, quota: Quota) -> None:
        """quota: of the ring's keys."""
        self._app = app
        self._ring = ring
        self._quota = quota

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        path = scope.get("path", "")
        if scope["type"] != "http" or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            await self._app(scope, receive, send)
            return
        scheme, _, secret = Headers(scope=scope).get("authorization", "").partition(" ")
        given = scheme.lower() == SCHEME and bool(secret.strip())
        number = self._ring.find(secret.strip()) if given else None
        if number is None:
            response = error_response(
                HTTPStatus.UNAUTHORIZED,
                "invalid_api_key" if given else "missing_api_key",
                "the API key is not known here"
                if given
                else "this server needs an API key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
                scope=scope,
            )
            await response(scope, receive, send)
            return
        refusal = self._quota.begin(number)
        if refusal is not None:
            code, message, seconds = refusal
            response = error_response(
                HTTPStatus.TOO_MANY_REQUESTS,
                code,
                message,
                headers={"Retry-After": str(math.ceil(seconds))},
                scope=scope,
            )
            await response(scope, receive, send)
            return
        caller_of(scope).key = self._ring.keys[number]
        try:
            await self._app(scope, receive, send)
        finally:
            self._quota.end(number)
