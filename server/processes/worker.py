"""One HTTP process: uvicorn and an AsyncEngine in one event loop, from start to drained."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from engine.errors import Draining, EngineDead
from engine.frontend.client import AsyncEngine
from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineReady
from server.app import create_app
from server.chat import ChatTemplate
from server.middleware.logs import configure
from server.processes.peer import PeerConfig, PeerProcess
from server.settings import ServerSettings

TICK_SECONDS = 0.05
FLUSH_SECONDS = 3
"""What a client may take, at the end, to read the last bytes of its answer."""

IDLE_SECONDS = 75
"""How long a connection may stay open between two requests."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: we drain before we stop it."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave them alone."""
        yield

    @property
    def busy(self) -> bool:
        """Whether a response is not complete."""
        return bool(self.server_state.tasks)

    async def end(self, serving: asyncio.Task[None], seconds: float) -> None:
        """Close what is idle, give responses some seconds to be read, cut off what is left."""
        self.should_exit = True
        await asyncio.wait((serving,), timeout=seconds)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await serving


class HttpWorker:
    """Serves until it is told to stop or the engine dies."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat: ChatTemplate,
        address: str,
        listener: socket.socket,
        settings: ServerSettings,
        *,
        exited: Callable[[], int | None] = lambda: None,
        supervise: Callable[[], int | None] = lambda: None,
        peers: Sequence[PeerProcess] = (),
    ) -> None:
        """address: the engine's; listener: listens already.

        exited: the engine process's exit status, None while it lives. supervise: called often once
        the engine was ready; the status that it died with for good. peers: drained with us.
        """
        self._tokenizer = tokenizer
        self._chat = chat
        self._address = address
        self._listener = listener
        self._settings = settings
        self._exited = exited
        self._supervise = supervise
        self._peers = peers
        self._stops = 0
        self._announced = False

    def stop(self) -> None:
        """Drain and end; a second call ends at once. For signal handlers."""
        self._stops += 1

    @property
    def hurried(self) -> bool:
        """Whether stop() was called twice."""
        return self._stops > 1

    def run(
        self, on_ready: Callable[[EngineReady], None] = lambda _: None, parent: int | None = None
    ) -> bool:
        """Serve. True if the engine and the peers lived until we were told to stop.

        on_ready: called once. parent: a file descriptor; its end tells us to stop.
        """
        return uvloop.run(self._run(on_ready, parent))

    async def _run(self, on_ready: Callable[[EngineReady], None], parent: int | None) -> bool:
        loop = asyncio.get_running_loop()
        configure(self._settings.log_format, self._settings.log_level)
        engine = AsyncEngine(
            self._tokenizer,
            self._address,
            max_queue=self._settings.max_queue,
            num_workers=self._settings.num_workers,
            recovers=self._settings.max_restarts > 0,
        )
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self.stop)
        if parent is not None:
            loop.add_reader(parent, self._hear, parent, engine)
        app = create_app(
            engine, self._chat, self._settings, self._exited, _tracing(self._settings.otlp_endpoint)
        )
        server = Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=IDLE_SECONDS,
                ssl_certfile=self._settings.ssl_certfile,
                ssl_keyfile=self._settings.ssl_keyfile,
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[self._listener]))
        lived = await self._until_stopped(engine, serving, on_ready)
        app.state.service.drain()
        for peer in self._peers:
            if not engine.alive:
                peer.give_up()
            peer.drain()
        await self._until_drained(engine, server)
        lived = lived and engine.alive
        engine.fail(Draining(f"the server shut down; it waited {self._settings.drain_seconds:g} s"))
        await server.end(serving, 0.0 if self.hurried else FLUSH_SECONDS)
        return lived

    def _hear(self, parent: int, engine: AsyncEngine) -> None:
        """What PeerProcess says."""
        if os.read(parent, 64):
            engine.fail(EngineDead("the engine process died too often"))
        else:
            asyncio.get_running_loop().remove_reader(parent)
            self.stop()

    def _watch_over(self, engine: AsyncEngine) -> None:
        """Keep the engine process alive, or note that it is gone for good."""
        if self._announced and engine.alive and (status := self._supervise()) is not None:
            engine.fail(EngineDead(f"the engine process ended with status {status}"))

    async def _until_stopped(
        self,
        engine: AsyncEngine,
        serving: asyncio.Task[None],
        on_ready: Callable[[EngineReady], None],
    ) -> bool:
        while not self._stops:
            if not self._announced and engine.ready is not None:
                self._announced = True
                on_ready(engine.ready)
            if not self._announced and (status := self._exited()) is not None:
                engine.fail(EngineDead(f"the engine process ended with status {status}"))
            self._watch_over(engine)
            if serving.done():  # it could not start; the exception comes where it is awaited
                return False
            if not engine.alive or any(peer.exit_status() is not None for peer in self._peers):
                return False
            await asyncio.sleep(TICK_SECONDS)
        return True

    async def _until_drained(self, engine: AsyncEngine, server: Server) -> None:
        """Give running streams a while to end by themselves."""
        deadline = time.monotonic() + (self._settings.drain_seconds if engine.alive else 0.0)
        while server.busy or any(peer.exit_status() is None for peer in self._peers):
            if self.hurried or time.monotonic() >= deadline:
                break
            self._watch_over(engine)
            await asyncio.sleep(TICK_SECONDS)


def _tracing(endpoint: str | None) -> Callable[[ASGIApp], ASGIApp] | None:
    if endpoint is None:
        return None
    from server.middleware.tracing import Tracing, otlp_provider  # noqa: PLC0415  # of an extra

    return partial(Tracing, provider=otlp_provider(endpoint))


def main() -> int:
    """A peer: configuration on standard input, whose end tells it to stop."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=PeerConfig)
    directory = Path(config.model_dir)
    tokenizer = Tokenizer.from_directory(directory)
    worker = HttpWorker(
        tokenizer,
        ChatTemplate.from_directory(directory, tokenizer),
        config.address,
        socket.socket(fileno=config.listener),
        config.settings,
    )
    return 0 if worker.run(parent=sys.stdin.fileno()) else 1


if __name__ == "__main__":
    sys.exit(main())
