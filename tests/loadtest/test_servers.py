"""Servers that are started for a measurement."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from loadtest.errors import Unmeasurable
from loadtest.servers import Server, free_port, started
from tests.patience import PATIENCE

PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-m", "http.server", "--bind", "127.0.0.1", sys.argv[1]])
"""


class Child(psutil.Process):
    """A process that may end between the listing and the signal."""

    gone = False
    paused = False

    def suspend(self) -> None:
        if self.gone:
            raise psutil.NoSuchProcess(self.pid)
        self.paused = True

    def resume(self) -> None:
        if self.gone:
            raise psutil.NoSuchProcess(self.pid)
        self.paused = False


def test_a_paused_server_does_nothing_and_ends() -> None:
    port = free_port()
    with started([sys.executable, "-c", PARENT, str(port)], port, "/") as server:
        assert len(server.processes()) == 2
        server.pause()
        deadline = time.monotonic() + PATIENCE
        while any(each.status() != psutil.STATUS_STOPPED for each in server.processes()):
            assert time.monotonic() < deadline
        answered = threading.Event()

        def ask() -> None:
            with suppress(OSError), urlopen(server.url, timeout=PATIENCE) as answer:
                assert answer.status == 200
                answered.set()

        asking = threading.Thread(target=ask)
        asking.start()
        assert not answered.wait(0.2)
        server.resume()
        asking.join()
        assert answered.is_set()
        serving = server.processes()[1]
        serving.kill()
    serving.wait(PATIENCE)
    server.resume()  # it is gone
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
        pass


def test_the_others_go_on_where_one_process_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    first, between, last = children = [Child(), Child(), Child()]
    monkeypatch.setattr(Server, "processes", lambda _: children)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        server = Server("", process, 0.0)
        between.gone = True
        server.pause()
        assert first.paused
        assert last.paused
        server.resume()
        assert not first.paused
        assert not last.paused


def test_one_that_ends_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no model', flush=True); raise SystemExit(3)"]
    with (
        pytest.raises(Unmeasurable, match=r"ended with status 3\nno model"),
        started(command, free_port(), "/", tmp_path / "log"),
    ):
        pass
