"""Locust itself, with one process and with several, against a server that only plays one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from typer.testing import CliRunner

from loadtest.load.address import Address
from loadtest.load.run import Locust, app
from loadtest.load.stream import OK

WAIT = 3.0
"""Seconds to the only token: longer than the load lasts."""


class Slow(BaseHTTPRequestHandler):
    """Every answer comes after the load has ended."""

    asked = 0
    prompts: ClassVar[list[tuple[int, ...]]] = []
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Slow.prompts.append(tuple(body.get("prompt", ())))
        answer = json.dumps({"token_ids": list(range(50))}).encode()
        if self.path == "/generate":
            assert 0 < body["max_tokens"] <= 256
            with Slow.lock:
                Slow.asked += 1
            time.sleep(WAIT)
            answer = (
                b'event: token\ndata: {}\n\nevent: done\ndata: {"usage":{"cached_tokens":2}}\n\n'
            )
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Slow.asked = 0
    Slow.prompts.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_answer_is_left_out(url: str, workers: int) -> None:
    seen = Locust(Address(url), 1024, workers).run("steady", 20.0, 2.0, seed=0)
    assert len(seen) == Slow.asked
    assert 5 < len(seen) < 90  # of about 40
    assert all(each.outcome == OK and each.cached_tokens == 2 for each in seen)
    assert all(each.first is not None and each.first >= WAIT for each in seen)


def test_every_run_has_prompts_of_its_own(url: str) -> None:
    """Else the server's prefix cache would have them from the run before."""
    runs = []
    for seed in (0, 0, 1):
        Slow.prompts.clear()
        Locust(Address(url), 256, 1).run("steady", 20.0, 2.0, seed)
        runs.append({prompt for prompt in Slow.prompts if prompt})
    first, again, other = runs
    assert first
    assert first & again
    assert not first & other


def test_another_kind_of_server(url: str) -> None:
    shown = CliRunner().invoke(app, ["--host", url, "--scenario", "ramp"])
    assert shown.exit_code == 3
    assert f"{url} is no Ropeway server: /v1/models: hello" in " ".join(shown.output.split())


def test_a_server_that_is_not_there() -> None:
    shown = CliRunner().invoke(app, ["--host", "http://127.0.0.1:9", "--scenario", "ramp"])
    assert shown.exit_code == 3
    assert "no server can be reached at http://127.0.0.1:9" in " ".join(shown.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "none"], "one of ramp, steady, burst"),
        (["--scenario", "burst"], "--rate is needed"),
        (["--rate", "0.1"], "at least 0.6"),
        (["--host", "http://x", "--serve", "--threads 1"], "not for --host"),
        (["--host", "localhost:8000"], "must be http://NAME:PORT or https://NAME:PORT"),
        (["--host", "http://x/v1"], "got 'http://x/v1'"),
        (["--host", "http://x", "--ssl-cafile", "/dev/null"], "certificates are for https://"),
        (["--host", "https://x", "--ssl-cafile", "/dev/null"], "/dev/null cannot be used"),
        (["--serve", "--ssl-certfile c"], "name it by --host"),
    ],
)
def test_misuse(arguments: list[str], message: str) -> None:
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 2
    assert message in " ".join(shown.output.split())
