"""A streamed answer that outlives its connection."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Self

import msgspec

from engine.errors import EngineError, InvalidRequest
from engine.frontend.client import AsyncEngine
from engine.frontend.stream import Piece, StreamState
from engine.messages import TokenLogprobs
from server.events import event_id
from server.service import Generation

LAST_EVENT_ID = "Last-Event-ID"


class Moved(EngineError):
    """Another HTTP process has taken the answer over, for a client that came back."""

    code = "stream_moved"


class SessionState(msgspec.Struct, frozen=True, kw_only=True):
    """All of a session, for another process.

    pieces: (stream, tokens, ended) in the order in which they came; a stream by its place.
    """

    echo: bool
    streams: list[StreamState]
    pieces: list[tuple[int, list[tuple[int, TokenLogprobs | None]], bool]]


class Session:
    """Collects an answer while somebody reads it, and keeps all of it.

    When nobody reads, the engine's pages are given back; when somebody comes, the engine goes on
    from the same token, which is the same one.
    """

    def __init__(self, engine: AsyncEngine, generation: Generation, *, echo: bool) -> None:
        """generation: fresh, or paused."""
        self.generation = generation
        self.echo = echo
        self.pieces: list[Piece] = []
        self.error: EngineError | None = None
        self.finished = False
        self._engine = engine
        self._paused = False
        self._num_readers = 0
        self._news = asyncio.Event()
        self._collecting: asyncio.Task[None] | None = None

    @classmethod
    def restored(cls, engine: AsyncEngine, generation: Generation, state: SessionState) -> Self:
        """A session as another process had it, which nobody reads. generation: of its streams,
        with all their tokens to take."""
        session = cls(engine, generation, echo=state.echo)
        deltas = [iter(stream.take()) for stream in generation.streams]
        for place, tokens, ended in state.pieces:
            taken = [next(deltas[place]) for _ in tokens]
            session.pieces.append(Piece(generation.streams[place], taken, ended))
        session.finished = all(each.finish_reason is not None for each in generation.streams)
        session._paused = True
        return session

    @property
    def idle(self) -> bool:
        """Whether nobody reads."""
        return self._num_readers == 0

    def enter(self) -> None:
        """Somebody reads from now on; leave() must follow.

        Raises QueueFull or EngineError where it cannot go on now.
        """
        if not self.finished:
            if self._paused:
                self._engine.resume(self.generation.group, uuid.uuid4().hex)
                self._paused = False
            if self._collecting is None:
                self._collecting = asyncio.create_task(self._collect())
        self._num_readers += 1

    async def leave(self) -> None:
        """Somebody reads no more."""
        self._num_readers -= 1
        if self.idle:
            await self._pause()

    async def give_away(self) -> SessionState:
        """Stop, for another process to go on. Whoever reads here gets an error."""
        await self._pause()
        streams = self.generation.streams
        if not self.finished:
            self.finished = True
            self.error = Moved("the stream goes on in another connection")
            self._wake()
        return SessionState(
            echo=self.echo,
            streams=self.generation.group.state,
            pieces=[
                (
                    streams.index(piece.stream),
                    [(delta.token_id, delta.logprobs) for delta in piece.deltas],
                    piece.ended,
                )
                for piece in self.pieces
            ],
        )

    async def close(self) -> None:
        """Nobody will come back."""
        await self._pause()
        if not self.finished:
            self.finished = True
            await self.generation.__aexit__()

    async def _pause(self) -> None:
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.gather(self._collecting, return_exceptions=True)
            self._collecting = None
        if not self.finished:
            self._engine.pause(self.generation.group)
            self._paused = True

    async def _collect(self) -> None:
        """Take what comes; at the end, count it."""
        try:
            async for pieces in self.generation:
                self.pieces += pieces
                self._wake()
        except EngineError as error:
            self.error = error
        self.finished = True
        self._wake()
        await self.generation.__aexit__()

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    async def news(self) -> None:
        """Until something has come, or the end."""
        await self._news.wait()


class Reader:
    """One reading of a session, from its beginning or from behind an event.

    `async with reader: async for pieces in reader`, once session.enter() was called.
    """

    def __init__(self, session: Session, after: str | None, left: Callable[[], None]) -> None:
        """after: the id of the last event that was seen; left: called when nobody reads any more.

        Raises InvalidRequest for an event that the session does not have.
        """
        self._session = session
        self._left = left
        self._rest: list[Piece] = []
        self._cursor = 0
        if after is not None:
            self._skip(after)

    def _skip(self, after: str) -> None:
        several = len(self._session.generation.streams) > 1
        for at, piece in enumerate(self._session.pieces):
            for number, delta in enumerate(piece.deltas, start=1):
                if event_id(piece.stream, delta.index, several=several) == after:
                    if number < len(piece.deltas) or piece.ended:
                        rest = Piece(piece.stream, piece.deltas[number:], piece.ended)
                        self._rest = [rest]
                    self._cursor = at + 1
                    return
        raise InvalidRequest(
            f"{LAST_EVENT_ID} {after!r} is no event of this stream so far", LAST_EVENT_ID
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Piece]:
        session = self._session
        while True:
            pieces = self._rest + session.pieces[self._cursor :]
            if pieces:
                self._rest, self._cursor = [], len(session.pieces)
                return pieces
            if session.error is not None:
                raise session.error
            if session.finished:
                raise StopAsyncIteration
            await session.news()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.leave()
        if self._session.idle:
            self._left()
