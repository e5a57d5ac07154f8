"""The type of a request's body."""

from __future__ import annotations

from http import HTTPStatus

from fastapi import Request

from server.errors import ApiError


async def require_json(request: Request) -> None:
    """Dependency of routes that take a body: it must be said to be JSON.

    So a page on another site cannot post a form here without asking first (CORS).
    """
    said = request.headers.get("content-type")
    kind = (said or "").partition(";")[0].strip().lower()
    if kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json")):
        return
    raise ApiError(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        f"Content-Type must be application/json, got {said or 'none'}",
    )
