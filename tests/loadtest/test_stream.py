"""The client against answers whose every byte and moment is known."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from loadtest.stream import CUT, LEFT, OK, Client, Generation

Answer = Callable[[Sequence[bytes | float]], str]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DONE = b'event: done\ndata: {"usage": {"cached_tokens": 7}}\n\n'


def token(index: int) -> bytes:
    return f'id: {index}\nevent: token\ndata: {{"index":{index}}}\n\n'.encode()


@pytest.fixture
def answer() -> Iterator[Answer]:
    """Starts a server that sends these bytes, sleeping where there is a number; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads = []

    def serve(pieces: Sequence[bytes | float]) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            try:
                for piece in pieces:
                    if isinstance(piece, float):
                        time.sleep(piece)
                    else:
                        connection.sendall(piece)
            except OSError:
                pass  # the client has left

    def start(pieces: Sequence[bytes | float]) -> str:
        threads.append(threading.Thread(target=serve, args=(pieces,)))
        threads[-1].start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    for thread in threads:
        thread.join()
    listener.close()


def run(url: str, late: float = 0.0, leaves_after: int | None = None) -> Generation:
    generation = Generation("steady", time.time() - late, 3)
    Client(url, 10.0).run(generation, (1, 2, 3), 8, leaves_after)
    return generation


def test_times(answer: Answer) -> None:
    # The second token comes in two pieces, the third with it.
    second, third = token(1), token(2)
    pieces = [HEAD, 0.2, token(0), 0.3, second[:9], 0.1, second[9:] + third, DONE]
    seen = run(answer(pieces))
    assert (seen.outcome, seen.status, seen.tokens, seen.cached_tokens) == (OK, 200, 3, 7)
    assert seen.first is not None
    assert 0.2 <= seen.first < 0.35
    assert 0.4 <= seen.gaps[0] < 0.6
    assert seen.gaps[1] == 0.0
    assert seen.total >= 0.6
    assert seen.tokens_per_s == pytest.approx(2 / seen.gaps[0])


def test_a_late_client_counts_against_the_first_token(answer: Answer) -> None:
    seen = run(answer([HEAD, token(0), DONE]), late=2.0)
    assert seen.late == pytest.approx(2.0, abs=0.1)
    assert seen.first == pytest.approx(2.0, abs=0.2)


def test_ends(answer: Answer) -> None:
    assert run(answer([HEAD, token(0)])).outcome == CUT
    error = b'event: error\ndata: {"code": "engine_dead", "message": ""}\n\n'
    assert run(answer([HEAD, token(0), error])).outcome == "engine_dead"
    body = json.dumps({"error": {"code": "queue_full"}}).encode()
    head = b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n" % len(body)
    refused = run(answer([head, body]))
    assert (refused.status, refused.outcome, refused.failed) == (429, "queue_full", True)


def test_an_impatient_client(answer: Answer) -> None:
    seen = run(answer([HEAD, token(0), token(1), 0.5, token(2), DONE]), leaves_after=2)
    assert (seen.outcome, seen.tokens, seen.failed) == (LEFT, 2, False)


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert run(f"http://127.0.0.1:{port}").outcome == "ConnectionRefusedError"
    with pytest.raises(ValueError, match="got 'localhost:8000'"):
        Client("localhost:8000", 1.0)
