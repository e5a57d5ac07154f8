"""The client against answers whose every byte and moment is known."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from loadtest.load import stream
from loadtest.load.address import Address
from loadtest.load.stream import CUT, LEFT, OK, Client, Generation
from tests.patience import PATIENCE

Answer = Callable[[Sequence[bytes | float]], str]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b'event: done\ndata: {"usage": {"cached_tokens": 7}}\n\n'


def token(index: int) -> bytes:
    return f'id: {index}\nevent: token\ndata: {{"index":{index}}}\n\n'.encode()


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Starts a server that sends these bytes, sleeping where there is a number; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads, over = [], threading.Event()

    def serve(pieces: Sequence[bytes | float]) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            try:
                for piece in pieces:
                    if isinstance(piece, float):
                        over.wait(piece)
                    else:
                        connection.sendall(piece)
            except OSError:
                pass  # the client has left

    def start(pieces: Sequence[bytes | float]) -> str:
        threads.append(threading.Thread(target=serve, args=(pieces,)))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    over.set()
    for thread in threads:
        thread.join()
    listener.close()


def run(url: str, late: float = 0.0, leaves_after: int | None = None) -> Generation:
    generation = Generation("steady", time.time() - late, 3)
    Client(Address(url), PATIENCE).run(generation, (1, 2, 3), 8, leaves_after)
    return generation


class Pieces(http.client.HTTPResponse):
    """Each comes at a moment of a clock that nothing else moves."""

    def __init__(self, pieces: Sequence[tuple[float, bytes]]) -> None:
        self._pieces = [*pieces, (pieces[-1][0], b"")]
        self._now = 0.0

    def read1(self, n: int = -1) -> bytes:
        self._now, piece = self._pieces.pop(0)
        return piece

    def perf_counter(self) -> float:
        return self._now


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second token comes in two pieces, the third with it.
    second, third = token(1), token(2)
    pieces = Pieces(
        [(10.25, token(0)), (10.5, second[:9]), (10.75, second[9:] + third), (11.0, DONE)]
    )
    monkeypatch.setattr(stream, "time", pieces)
    seen = Generation("steady", 0.0, 3)
    stream._read(pieces, seen, 10.0, None)
    assert (seen.outcome, seen.tokens, seen.cached_tokens) == (OK, 3, 7)
    assert (seen.first, seen.gaps, seen.tokens_per_s) == (0.25, [0.5, 0.0], 4.0)


def test_the_clock_runs_from_before_the_request(answer: Answer) -> None:
    began = time.perf_counter()
    seen = run(answer([HEAD, 0.2, token(0), 0.2, DONE]), late=2.0)
    took = time.perf_counter() - began
    assert (seen.outcome, seen.status, seen.tokens) == (OK, 200, 1)
    assert 2.0 <= seen.late < 2.0 + took
    assert seen.first is not None
    assert seen.first - seen.late >= 0.2
    assert seen.first <= seen.total
    assert 2.4 <= seen.total < 2.0 + took


def test_ends(answer: Answer) -> None:
    assert run(answer([HEAD, token(0)])).outcome == CUT
    error = b'event: error\ndata: {"code": "engine_dead", "message": ""}\n\n'
    assert run(answer([HEAD, token(0), error])).outcome == "engine_dead"
    body = json.dumps({"error": {"code": "queue_full"}}).encode()
    head = b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n" % len(body)
    refused = run(answer([head, body]))
    assert (refused.status, refused.outcome, refused.failed) == (429, "queue_full", True)


def test_an_impatient_client(answer: Answer) -> None:
    seen = run(answer([HEAD, token(0), token(1), PATIENCE, token(2), DONE]), leaves_after=2)
    assert (seen.outcome, seen.tokens, seen.failed) == (LEFT, 2, False)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert run(f"http://127.0.0.1:{port}").outcome == "ConnectionRefusedError"
    with pytest.raises(ValueError, match="got 'localhost:8000'"):
        Address("localhost:8000")
