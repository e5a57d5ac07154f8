"""A server on a real socket, before an engine that the test plays."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp

from engine.frontend.client import AsyncEngine
from server.app import create_app
from server.chat import ChatTemplate
from server.processes.worker import Server
from server.service import Service
from server.settings import ServerSettings
from tests.patience import PATIENCE
from tests.server.fake_engine import FakeEngine, byte_tokenizer

SETTINGS = ServerSettings(max_queue=1, max_body_bytes=4096, keep_alive_seconds=0.2)


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"use_uvloop": True}


@dataclass(frozen=True)
class Served:
    """Everything that a test may want to touch."""

    fake: FakeEngine
    service: Service
    http: httpx.AsyncClient
    port: int

    async def until_ready(self) -> None:
        """The engine answers, and /ready says so."""
        await self.fake.ready()
        async with asyncio.timeout(PATIENCE):
            while (await self.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def raw(
        self, body: dict[str, Any]
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """POST /generate over a bare connection, which the test may break or not read."""
        content = json.dumps(body).encode()
        bare = socket.socket()
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        bare.connect(("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=bare, limit=1 << 16)
        try:
            writer.write(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
            )
            yield reader, writer
        finally:
            writer.transport.abort()
            await asyncio.sleep(0)


@asynccontextmanager
async def running(
    directory: Path,
    settings: ServerSettings,
    tracing: Callable[[ASGIApp], ASGIApp] | None = None,
) -> AsyncIterator[Served]:
    """uvicorn in this loop; the engine is bound but says nothing yet."""
    fake = FakeEngine(directory)
    fake.bind()
    tokenizer = byte_tokenizer()
    engine = AsyncEngine(tokenizer, fake.address, max_queue=settings.max_queue)
    chat = ChatTemplate.from_directory(directory, tokenizer)
    app = create_app(engine, chat, settings, lambda: fake.exit_status, tracing)
    listener = socket.create_server(("127.0.0.1", 0))
    # Small buffers in the kernel, so that a reader is slow after kilobytes and not megabytes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
    port = listener.getsockname()[1]
    server = Server(uvicorn.Config(app, http="httptools", ws="none", log_level="warning"))
    serving = asyncio.create_task(server.serve([listener]))
    http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False)
    try:
        async with http:
            yield Served(fake, app.state.service, http, port)
    finally:
        await server.end(serving, 1.0)
        await fake.close()


@pytest.fixture
async def starting(tmp_path: Path) -> AsyncIterator[Served]:
    """A server whose engine still loads its model."""
    async with running(tmp_path, SETTINGS) as served:
        yield served


@pytest.fixture
async def served(starting: Served) -> Served:
    """A server that is ready."""
    await starting.until_ready()
    return starting


@dataclass(frozen=True)
class Event:
    """One server-sent event, or a comment."""

    id: str | None
    event: str | None
    data: Any


def parse_events(text: str) -> list[Event]:
    """Events by the rules of the specification that we use."""
    events = []
    assert text.endswith("\n\n") or not text
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        if "" not in fields:
            events.append(Event(fields.get("id"), fields.get("event"), json.loads(fields["data"])))
    return events


@pytest.fixture(scope="module")
async def large(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for many tests, with the usual limit on bodies."""
    settings = replace(SETTINGS, max_body_bytes=1 << 20)
    async with running(tmp_path_factory.mktemp("large"), settings) as served:
        await served.until_ready()
        yield served
