"""The sessions of an HTTP process, and how one goes over to another process.

Each process listens on a socket of its own in the folder that they share. A client that comes back
may reach any of them: that one asks the others for the session, and whoever has it gives it away.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import msgspec

from engine.messages import TokenLogprobs
from server.access.caller import Caller
from server.errors import ApiError
from server.service import Service
from server.session import Reader, Session, SessionState

LENGTH_BYTES = 8
Name = tuple[str | None, str]
"""Whose it is (a key's name), and its request id."""


class Sessions:
    """Of one process. A session is kept for `window` seconds after its last reader left."""

    def __init__(self, service: Service) -> None:
        """service: whose settings say how long, and where the others are."""
        settings = service.settings
        self._service = service
        self._window = settings.resume_window
        self._sessions: dict[Name, Session] = {}
        self._ends: dict[Name, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        folder = None if settings.shared_dir is None else Path(settings.shared_dir)
        workers = range(settings.num_workers if folder is not None and self._window else 0)
        sockets = {each: f"{folder}/resume-{each}" for each in workers}
        self._socket = sockets.pop(settings.worker, None)
        self._others = list(sockets.values())

    async def start(self) -> None:
        """Be there for the others."""
        if self._socket is not None:
            self._server = await asyncio.start_unix_server(self._answer, self._socket)

    async def close(self) -> None:
        """End everything."""
        if self._server is not None:
            self._server.close()
        for end in self._ends.values():
            end.cancel()
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()
        await asyncio.gather(*self._closing)

    def check_free(self, caller: Caller) -> None:
        """Raises ApiError where the caller's request id names a session that is kept."""
        if _name(caller, caller.request_id) in self._sessions:
            raise ApiError(
                HTTPStatus.CONFLICT,
                "request_id_in_use",
                f"X-Request-Id {caller.request_id} names a stream that can still be resumed",
            )

    def open(self, caller: Caller, session: Session) -> Reader:
        """Keep a session, and read it."""
        return self._read(_name(caller, caller.request_id), session, None)

    async def resume(
        self, caller: Caller, request_id: str, after: str | None
    ) -> tuple[Session, Reader]:
        """A session of the caller's, whichever process has it.

        Raises ApiError where there is none, InvalidRequest for an event that it does not have, and
        QueueFull or EngineError where it cannot go on now.
        """
        self._service.check_ready()
        name = _name(caller, request_id)
        session = self._sessions.get(name) or await self._fetch(name, caller)
        if session is None:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                "stream_not_found",
                f"no stream {request_id} of this key can be resumed; a stream is kept for "
                f"{self._window:g} s (--resume-window) after its client was lost",
            )
        caller.streams = session.generation.streams
        return session, self._read(name, session, after)

    def _read(self, name: Name, session: Session, after: str | None) -> Reader:
        self._sessions[name] = session
        try:
            reader = Reader(session, after, lambda: self._left(name))
            session.enter()
        except BaseException:
            if session.idle:
                self._left(name)
            raise
        if (end := self._ends.pop(name, None)) is not None:
            end.cancel()
        return reader

    def _left(self, name: Name) -> None:
        """Nobody reads it any more: it is kept for a while."""
        if name in self._sessions and name not in self._ends:
            loop = asyncio.get_running_loop()
            self._ends[name] = loop.call_later(self._window, self._forget, name)

    def _forget(self, name: Name) -> None:
        self._ends.pop(name, None)
        session = self._sessions.pop(name, None)
        if session is not None:
            closing = asyncio.create_task(session.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _fetch(self, name: Name, caller: Caller) -> Session | None:
        """From whichever other process has it."""
        for socket in self._others:
            with suppress(OSError):  # that process is gone, and so is what it had
                reader, writer = await asyncio.open_unix_connection(socket)
                try:
                    await _send(writer, msgspec.msgpack.encode(name))
                    content = await _receive(reader)
                except asyncio.IncompleteReadError:
                    continue
                finally:
                    writer.close()
                state = msgspec.msgpack.decode(content, type=SessionState | None)
                if state is not None:
                    return self._restored(state, caller)
        return None

    def _restored(self, state: SessionState, caller: Caller) -> Session:
        engine = self._service.engine
        tokens: list[list[tuple[int, TokenLogprobs | None]]] = [[] for _ in state.streams]
        for place, some, _ in state.pieces:
            tokens[place] += some
        group = engine.restore(state.streams, tokens)
        return Session.restored(engine, self._service.generation(group, caller), state)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Another process asks for a session."""
        try:
            name = msgspec.msgpack.decode(await _receive(reader), type=Name)
            session = self._sessions.pop(name, None)
            if (end := self._ends.pop(name, None)) is not None:
                end.cancel()
            state = None if session is None else await session.give_away()
            await _send(writer, msgspec.msgpack.encode(state))
        except (OSError, asyncio.IncompleteReadError):
            pass  # whoever asked is gone
        finally:
            writer.close()


def _name(caller: Caller, request_id: str) -> Name:
    return (None if caller.key is None else caller.key.name, request_id)


async def _send(writer: asyncio.StreamWriter, content: bytes) -> None:
    writer.write(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "little")
    return await reader.readexactly(size)
