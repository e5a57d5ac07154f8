"""An engine process that computes nothing: every open request gets a token in every step.

`python -m loadtest.bench.fake_engine ADDRESS RATE`: RATE steps a second, 0: none, so that streams
wait.
"""

from __future__ import annotations

import sys
import time

import msgspec
import zmq

from engine.messages import (
    AbortRequest,
    AddRequest,
    EngineOutput,
    EngineReady,
    EngineStats,
    Hello,
    StepOutput,
    ToCore,
)
from engine.request import FinishReason

MAX_SEQS = 4096
CATCH_UP_SECONDS = 0.1
"""How late a step may be for the next ones to make up for it."""

READY = EngineReady(
    model="fake",
    num_parameters=0,
    device="none",
    dtype="none",
    attention="none",
    products="none",
    num_blocks=1 << 20,
    block_size=64,
    kv_bytes=0,
    max_position=1 << 20,
    eos_token_id=None,
    max_num_seqs=MAX_SEQS,
    max_num_batched_tokens=MAX_SEQS,
    threads=0,
)


class FakeEngine:
    """On a bound ROUTER socket, as the engine's: each frontend gets the tokens of its requests."""

    def __init__(self, socket: zmq.Socket[bytes], rate: float) -> None:
        """rate: steps a second."""
        self._socket = socket
        self._interval = 1 / rate if rate else None
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder = msgspec.msgpack.Decoder(ToCore)
        self._left: dict[str, tuple[int, int]] = {}  # request id -> next index, last index
        self._owners: dict[str, bytes] = {}
        self._steps = 0

    def run(self) -> None:
        """Until the process is ended."""
        due = time.monotonic()
        while True:
            wait = None
            if self._interval is not None and self._left:
                wait = max(0, int((due - time.monotonic()) * 1000))
            if self._socket.poll(wait):
                waited = not self._left
                self._receive()
                due = time.monotonic() if waited else due
                continue
            if self._interval is not None and time.monotonic() >= due:
                self._step()
                due = max(due + self._interval, time.monotonic() - CATCH_UP_SECONDS)

    def _receive(self) -> None:
        frontend, content = self._socket.recv_multipart()
        match self._decoder.decode(content):
            case AddRequest() as request:
                self._left[request.request_id] = (0, request.max_tokens - 1)
                self._owners[request.request_id] = frontend
            case AbortRequest(request_id):
                self._left.pop(request_id, None)
                self._owners.pop(request_id, None)
            case Hello():
                self._socket.send_multipart([frontend, self._encode(READY)])

    def _step(self) -> None:
        self._steps += 1
        outputs: dict[bytes, list[EngineOutput]] = {}
        for request_id, (index, last) in list(self._left.items()):
            end = FinishReason.LENGTH if index == last else None
            queue = 0.0 if index == 0 else None
            output = EngineOutput(request_id, index, 97 + index % 26, end, None, queue)
            outputs.setdefault(self._owners[request_id], []).append(output)
            if end is None:
                self._left[request_id] = (index + 1, last)
            else:
                del self._left[request_id], self._owners[request_id]
        stats = EngineStats(running=len(self._left), steps=self._steps)
        for frontend, each in outputs.items():
            self._socket.send_multipart([frontend, self._encode(StepOutput(each, stats))])


def main() -> None:
    """See above."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.bind(sys.argv[1])
        FakeEngine(socket, float(sys.argv[2])).run()


if __name__ == "__main__":
    main()
