"""An engine process that is no process: it speaks the protocol, and the test says what."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from engine.frontend.tokenizer import Tokenizer
from engine.messages import (
    AddRequest,
    EngineOutput,
    EngineReady,
    EngineStats,
    FromCore,
    Hello,
    StepOutput,
    ToCore,
)
from engine.request import FinishReason
from tests.patience import PATIENCE

EOS = 256
READY = EngineReady(
    model="fake",
    num_parameters=1234,
    device="cpu",
    dtype="float32",
    attention="none",
    products="none",
    num_blocks=8,
    block_size=16,
    kv_bytes=1 << 20,
    max_position=64,
    eos_token_id=EOS,
    max_num_seqs=2,
    max_num_batched_tokens=32,
    threads=1,
    rotary_dim=16,
    max_profiles=8,
)

M = TypeVar("M", bound=ToCore)


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, so that a token can be part of a character."""
    return Tokenizer(r"(?s:.)", {bytes([byte]): byte for byte in range(256)}, {"<|end|>": EOS})


class FakeEngine:
    """What AsyncEngine talks to. Nothing happens unless the test says so."""

    def __init__(self, directory: Path) -> None:
        self.address = f"ipc://{directory / 'engine'}"
        self.exit_status: int | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._new_socket()
        self._inbox: asyncio.Queue[ToCore] = asyncio.Queue()
        self._frontend = b""
        self._reading: asyncio.Task[None] | None = None

    def _new_socket(self) -> zmq.asyncio.Socket:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        return socket

    def open(self) -> None:
        """Be there again after die(), as another process."""
        self.exit_status = None
        self._socket = self._new_socket()
        self.bind()

    def bind(self) -> None:
        """Be there; Hellos are answered by ready()."""
        self._socket.bind(self.address)
        self._reading = asyncio.create_task(self._read())

    async def ready(self) -> None:
        """Wait for the frontend's Hello and answer it: the model is loaded."""
        await self.expect(Hello)
        await self.welcome(READY)

    async def welcome(
        self,
        ready: EngineReady,
        suspects: Mapping[str, int] | None = None,
        poisoned: Iterable[str] = (),
    ) -> None:
        """Answer a Hello."""
        await self._send(
            msgspec.structs.replace(ready, suspects=dict(suspects or {}), poisoned=list(poisoned))
        )

    async def expect(self, kind: type[M], timeout: float = PATIENCE) -> M:
        """The next message, which must be of a kind."""
        message = await self.next(timeout)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    async def next(self, timeout: float) -> ToCore:
        """The next message."""
        return await asyncio.wait_for(self._inbox.get(), timeout)

    @property
    def quiet(self) -> bool:
        """Whether nothing waits to be expected."""
        return self._inbox.empty()

    async def step(self, *outputs: EngineOutput, stats: EngineStats | None = None) -> None:
        """One message, as after a step."""
        await self._send(StepOutput(list(outputs), stats or EngineStats()))

    async def say(
        self,
        request: AddRequest,
        tokens: Iterable[int],
        *,
        start: int = 0,
        end: FinishReason | None = None,
    ) -> None:
        """Tokens of one request, one step each; the last one has the finish reason."""
        some = list(tokens)
        for at, token_id in enumerate(some):
            reason = end if at == len(some) - 1 else None
            queue = 0.25 if start + at == 0 else None
            await self.step(
                EngineOutput(request.request_id, start + at, token_id, reason, None, queue)
            )

    async def die(self) -> None:
        """As kill -9 does: the system closes the connections."""
        self.exit_status = -9
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
            self._reading = None
        self._socket.close()

    async def close(self) -> None:
        """End of the test."""
        await self.die()
        self._context.term()

    async def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToCore)
        while True:
            self._frontend, content = await self._socket.recv_multipart()
            self._inbox.put_nowait(decoder.decode(content))

    async def _send(self, message: FromCore) -> None:
        await self._socket.send_multipart([self._frontend, msgspec.msgpack.encode(message)])
