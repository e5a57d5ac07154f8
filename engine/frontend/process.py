"""The engine's process, seen from the one that starts it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineStartError

MAX_SOCKET_PATH = 107
"""What a Unix socket's address holds, without the terminating zero (103 on macOS)."""


class EngineProcess:
    """Starts, watches and stops `python -m engine.core`.

    Its standard input is a pipe: first the configuration, then nothing until the end of file, which
    tells it to exit. So it never outlives the process that started it, however that one ends. It is
    in a process group of its own: a Ctrl-C in the terminal reaches the server, which drains first.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Raises EngineStartError where no socket can be had."""
        self._config = config
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="ropeway-")
        except OSError as error:
            raise EngineStartError(f"no folder for the engine's socket: {error}") from error
        self._process: subprocess.Popen[bytes] | None = None
        socket = str(Path(self._folder.name) / "engine")
        if len(os.fsencode(socket)) > MAX_SOCKET_PATH:
            self._folder.cleanup()
            raise EngineStartError(
                f"the engine's socket {socket} has a path of more than {MAX_SOCKET_PATH} bytes; "
                f"let TMPDIR name a shorter folder"
            )
        self.address = f"ipc://{socket}"

    def start(self) -> None:
        """Start the process; it is ready when it answers a Hello at the address."""
        # -P: a folder named `engine` where the user stands must not be taken for ours.
        command = [sys.executable, "-P", "-m", "engine.core", self.address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        self._process.stdin.flush()

    def exit_status(self) -> int | None:
        """The exit status, None while the process lives."""
        return None if self._process is None else self._process.poll()

    def wait(self, timeout: float) -> int | None:
        """The exit status, None if the process still lives after `timeout` seconds."""
        if self._process is None:
            return None
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, timeout: float = 5.0) -> None:
        """Ask it to exit; kill it after `timeout` seconds."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._folder.cleanup()
