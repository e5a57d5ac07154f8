"""A server of our own on this machine, for as long as a block lasts."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

START_SECONDS = 120.0


@contextmanager
def local_server(arguments: Sequence[str]) -> Iterator[str]:
    """`ropeway serve ARGUMENTS` on a free port, ready; yields its URL.

    Raises RuntimeError where it ends or is not ready within START_SECONDS.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "server.cli", "serve", *arguments, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_ready(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until GET /ready succeeds. Raises RuntimeError."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        with suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {START_SECONDS:g} s")
