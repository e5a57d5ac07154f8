"""One connection of a frontend to one life of the engine process."""

from __future__ import annotations

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from engine.messages import FromCore, ToCore


class Connection:
    """Messages to and from the engine, and the news of its death.

    A process that is started again gets a new connection: what was under way to the old one, or
    came from it, must not reach the new one.
    """

    def __init__(self, context: zmq.asyncio.Context, address: str) -> None:
        """Connects; messages wait until somebody listens at the address."""
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromCore)
        self._socket.connect(address)

    def send(self, message: ToCore) -> None:
        """In order, sooner or later."""
        self._socket.send(self._encoder.encode(message))

    async def receive(self) -> FromCore:
        """The next message."""
        message: FromCore = self._decoder.decode(await self._socket.recv())
        return message

    async def lost(self) -> None:
        """Until the engine process is dead: the system closes its connections at once."""
        await recv_monitor_message(self._monitor)

    def close(self) -> None:
        """Hang up; what was not sent is dropped."""
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
