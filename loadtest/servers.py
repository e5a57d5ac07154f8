"""Servers as processes of their own: started on a free port, waited for, measured, ended."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import psutil

from loadtest.errors import Unmeasurable

READY_SECONDS = 300.0
STOP_SECONDS = 30.0
ANSWER_SECONDS = 5.0
LOG_CHARACTERS = 2000
OTHER_FILES = 200
PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


resource: Any = import_module("resource") if find_spec("resource") else None


@dataclass(frozen=True)
class Server:
    """A running server. ready_s: from its start to the first answer that it is ready."""

    url: str
    process: subprocess.Popen[bytes]
    ready_s: float

    def processes(self) -> list[psutil.Process]:
        """It and all that it started."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def pause(self) -> None:
        """Let it take no more of the machine until resume()."""
        for each in self.processes():
            with suppress(psutil.NoSuchProcess):
                each.suspend()

    def resume(self) -> None:
        """It goes on; no harm where it was not paused, or has ended."""
        with suppress(psutil.NoSuchProcess):
            processes = self.processes()
            for each in processes:
                with suppress(psutil.NoSuchProcess):  # the others go on all the same
                    each.resume()

    def peak_bytes(self) -> int | None:
        """The most memory that each of its processes has held, together; None but on Linux."""
        total = 0
        for each in self.processes():
            try:
                status = Path(f"/proc/{each.pid}/status").read_text()
            except FileNotFoundError:
                return None
            match = PEAK.search(status)
            total += 1024 * int(match[1]) if match else 0
        return total


def allow_connections(count: int) -> None:
    """Let this process and the servers it starts hold so many, besides their other files.

    Raises Unmeasurable where the system forbids it.
    """
    if resource is None:  # a system without such limits
        return
    needed = count + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise Unmeasurable(f"{needed} open files are needed, the limit is {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def started(
    command: Sequence[str],
    port: int,
    ready: str,
    log: Path | None = None,
) -> Iterator[Server]:
    """A command that serves on this port, once GET `ready` answers 200; ended afterwards.

    log: where its output goes, standard error else. Raises Unmeasurable where it ends or is not
    ready in READY_SECONDS.
    """
    url = f"http://127.0.0.1:{port}"
    start = time.perf_counter()
    with open(log or "/dev/null", "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output if log else None,
            process_group=0,
        )
        try:
            _wait_ready(url + ready, process, log)
            yield Server(url, process, time.perf_counter() - start)
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def ropeway(*arguments: str | Path) -> Iterator[Server]:
    """`ropeway serve ARGUMENTS`: a model, if it is not the shipped one, and options."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "server.cli", "serve", *map(str, arguments)]
    with started([*command, "--port", str(port)], port, "/ready") as server:
        yield server


def _get(url: str) -> tuple[int, str]:
    """Status and body, by no proxy. OSError where nobody answers, ValueError where it is no URL."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=ANSWER_SECONDS) as response:
            return response.status, response.read().decode()
    except HTTPError as refusal:
        with refusal:
            return refusal.code, refusal.read().decode()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path | None) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace")[-LOG_CHARACTERS:] if log else ""
            raise Unmeasurable(f"the server ended with status {process.returncode}\n{last}".strip())
        with suppress(OSError):
            if _get(url)[0] == 200:
                return
        time.sleep(0.02)
    raise Unmeasurable(f"{url} was not ready within {READY_SECONDS:.0f} s")


def check_reachable(url: str) -> None:
    """Raises Unmeasurable unless a server answers there that it is ready."""
    try:
        status, body = _get(f"{url}/ready")
    except (OSError, ValueError) as error:
        raise Unmeasurable(f"no server can be reached at {url}: {error}") from error
    if status != 200:
        raise Unmeasurable(f"{url}/ready: {status}: {body}")
