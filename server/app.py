"""create_app(): the FastAPI application around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from engine.frontend.client import AsyncEngine
from server import errors
from server.access.keys import KeyRing
from server.access.quota import Quota
from server.chat import ChatTemplate
from server.limits import BodyLimit
from server.middleware.auth import Authentication
from server.middleware.headers import SecurityHeaders
from server.middleware.identity import HEADER as REQUEST_ID
from server.middleware.identity import RequestIds
from server.middleware.logs import AccessLog
from server.routes import generate, openai, ops, page, score
from server.service import Service
from server.sessions import Sessions
from server.settings import ServerSettings


def create_app(
    engine: AsyncEngine,
    chat: ChatTemplate,
    settings: ServerSettings,
    exited: Callable[[], int | None],
    tracing: Callable[[ASGIApp], ASGIApp] | None = None,
) -> FastAPI:
    """An application that starts the engine's connection with itself and closes it at its end.

    It listens while the engine loads its model: /health says 200 then and /ready 503.
    exited: the engine process's exit status, None while it lives. tracing: wraps an application in
    one that records spans. Raises ConfigError for a file of keys that cannot be used.
    """
    ring = None if settings.api_key_file is None else KeyRing.from_file(Path(settings.api_key_file))
    quota = None if ring is None else _quota(ring, settings)

    service = Service(engine, chat, settings)
    sessions = Sessions(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await sessions.start()
        starting = asyncio.create_task(engine.start(exited))
        try:
            yield
        finally:
            await sessions.close()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            await engine.close()
            if quota is not None:
                quota.close()

    app = FastAPI(
        title="Ropeway",
        version=metadata.version("ropeway"),
        description="Inference for GPT-2-family models with rotary position embeddings.",
        lifespan=lifespan,
    )
    app.state.service = service
    app.state.sessions = sessions
    # The last is the first that a request meets.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if ring is not None and quota is not None:
        app.add_middleware(Authentication, ring=ring, quota=quota)
    app.add_middleware(SecurityHeaders)
    if tracing is not None:
        app.add_middleware(tracing)
    app.add_middleware(AccessLog)
    app.add_middleware(RequestIds)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Last-Event-ID", REQUEST_ID],
            expose_headers=["Retry-After", REQUEST_ID],
        )
    app.include_router(generate.router)
    app.include_router(openai.router)
    app.include_router(score.router)
    app.include_router(ops.router)
    page.install(app)
    errors.install(app)
    return app


def _quota(ring: KeyRing, settings: ServerSettings) -> Quota:
    path = None if settings.shared_dir is None else Path(settings.shared_dir) / "quota"
    return Quota(ring.keys, path, worker=settings.worker, num_workers=settings.num_workers)
