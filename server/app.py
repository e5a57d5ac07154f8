"""create_app(): the FastAPI application around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import FastAPI

from engine.frontend.client import AsyncEngine
from server import errors
from server.limits import BodyLimit
from server.routes import generate, ops, page
from server.service import Service
from server.settings import ServerSettings


def create_app(
    engine: AsyncEngine,
    settings: ServerSettings,
    exited: Callable[[], int | None],
) -> FastAPI:
    """An application that starts the engine's connection with itself and closes it at its end.

    It listens while the engine loads its model: /health says 200 then and /ready 503.
    exited: the engine process's exit status, None while it lives.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(engine.start(exited))
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.close()

    app = FastAPI(
        title="Ropeway",
        version=metadata.version("ropeway"),
        description="Inference for GPT-2-family models with rotary position embeddings.",
        lifespan=lifespan,
    )
    app.state.service = Service(engine, settings)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.include_router(generate.router)
    app.include_router(ops.router)
    page.install(app)
    errors.install(app)
    return app
