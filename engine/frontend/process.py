"""The engine's process, seen from the one that starts it and keeps it alive."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineStartError

MAX_SOCKET_PATH = 107
"""What a Unix socket's address holds, without the terminating zero (103 on macOS)."""

BACK_OFF_SECONDS, MAX_BACK_OFF_SECONDS = 0.1, 5.0
"""Before the first restart; twice as long before each further one, up to the second."""

HEALTHY_SECONDS = 60.0
"""A process that has lived so long has had nothing to do with the deaths before."""


class EngineProcess:
    """Starts, watches and stops `python -m engine.core`.

    Its standard input is a pipe: first the configuration, then nothing until the end of file, which
    tells it to exit. So it never outlives the process that started it, however that one ends. It is
    in a process group of its own: a Ctrl-C in the terminal reaches the server, which drains first.
    """

    def __init__(self, config: EngineConfig, module: str = "engine.core") -> None:
        """module: whose main() is run. Raises EngineStartError where no socket can be had."""
        self._config = config
        self._module = module
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
        """Start the process, or another one where it has died.

        It is ready when it answers a Hello at the address.
        """
        journal = str(Path(self._folder.name) / "step")
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        # -P: a folder named `engine` where the user stands must not be taken for ours.
        command = [sys.executable, "-P", "-m", self._module, self.address, journal]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        self._process.stdin.flush()

    @property
    def folder(self) -> Path:
        """A folder of the processes that belong together, gone when they end."""
        return Path(self._folder.name)

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


class Supervisor:
    """Starts an engine process again when it has died, ever later, and in the end not any more."""

    def __init__(
        self,
        process: EngineProcess,
        max_restarts: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """max_restarts: in a row, without HEALTHY_SECONDS of life between them."""
        self._process = process
        self._max_restarts = max_restarts
        self._clock = clock
        self._in_a_row = 0
        self._started = clock()
        self._due: float | None = None

    def poll(self) -> int | None:
        """To be called often: restarts the process where that is due.

        None while it lives or will live again, else the exit status that it died with for good.
        """
        status = self._process.exit_status()
        if status is None:
            return None
        now = self._clock()
        if self._due is None:
            if now - self._started > HEALTHY_SECONDS:
                self._in_a_row = 0
            if self._in_a_row >= self._max_restarts:
                return status
            self._due = now + min(BACK_OFF_SECONDS * 2**self._in_a_row, MAX_BACK_OFF_SECONDS)
        if now >= self._due:
            self._due = None
            self._in_a_row += 1
            self._started = now
            self._process.start()
        return None
