"""GET /: the playground, a page of three files and nothing from elsewhere."""

from __future__ import annotations

import os

from fastapi import FastAPI, Request, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
"""Only our files; and no script may make HTML of a text, such as a model's."""


class PageFiles(StaticFiles):
    """The page's files. Browsers keep them, and ask each time whether they are still the same."""

    def __init__(self) -> None:
        super().__init__(packages=[("server", "static")])

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """A file, or 304 where the browser has it."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["Content-Security-Policy"] = POLICY
        return response


def install(app: FastAPI) -> None:
    """Serve the page and its files."""
    files = PageFiles()
    app.mount("/static", files)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page(request: Request) -> Response:
        """The playground."""
        return await files.get_response("index.html", request.scope)
