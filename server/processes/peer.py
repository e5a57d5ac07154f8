"""A further HTTP process on the same port, seen from the one that starts it."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import msgspec

from server.settings import ServerSettings


class PeerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """address: the engine's; listener: file descriptor of a listening socket."""

    address: str
    model_dir: str
    listener: int
    settings: ServerSettings


class PeerProcess:
    """Starts, watches and stops `python -m server.processes.worker`.

    As with the engine's process, its standard input is a pipe: first the configuration, then
    nothing until the end of file, which tells it to drain and exit, however this process ends. A
    line before that says that the engine is gone for good.
    """

    def __init__(self, config: PeerConfig) -> None:
        """The process starts at once."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.processes.worker"],
            stdin=subprocess.PIPE,
            pass_fds=(config.listener,),
            process_group=0,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")
        self._process.stdin.flush()

    def exit_status(self) -> int | None:
        """The exit status, None while the process lives."""
        return self._process.poll()

    def give_up(self) -> None:
        """Tell it that the engine will not come back, so that its streams end by an error."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.write(b"\n")
                self._process.stdin.flush()

    def drain(self) -> None:
        """Tell it to drain and exit."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def stop(self, timeout: float) -> None:
        """Tell it to exit; kill it after `timeout` seconds."""
        self.drain()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
