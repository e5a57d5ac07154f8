"""A server of our own to be mistreated: its processes, what it holds, and its metrics."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

METRIC = re.compile(r"^ropeway_(\w+) (\S+)$", re.MULTILINE)
START_SECONDS = 120.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Footprint:
    """What the two processes take, in MiB of resident memory and in open files."""

    http_mib: float
    engine_mib: float
    http_files: int


class Victim:
    """`ropeway serve` with one HTTP process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.url = url
        self._process = process

    def _engine(self) -> psutil.Process | None:
        for child in psutil.Process(self._process.pid).children():
            if "engine.core" in child.cmdline():
                return child
        return None

    def kill_engine(self) -> None:
        """kill -9. RuntimeError where there is no engine process."""
        engine = self._engine()
        if engine is None:
            raise RuntimeError("there is no engine process to kill")
        engine.kill()

    def footprint(self) -> Footprint:
        """Of both processes, now."""
        http, engine = psutil.Process(self._process.pid), self._engine()
        if engine is None:
            raise RuntimeError("there is no engine process")
        return Footprint(
            round(http.memory_info().rss / 2**20, 1),
            round(engine.memory_info().rss / 2**20, 1),
            http.num_fds(),
        )

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Gauges and counters without labels, by their names after `ropeway_`."""
        async with session.get(f"{self.url}/metrics") as response:
            return {name: float(value) for name, value in METRIC.findall(await response.text())}

    async def until(self, session: aiohttp.ClientSession, status: int, seconds: float) -> None:
        """Wait for /ready to answer so. RuntimeError where the server ends, or takes longer."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (ended := self._process.poll()) is not None:
                raise RuntimeError(f"the server ended with status {ended}")
            try:
                async with session.get(f"{self.url}/ready") as response:
                    if response.status == status:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(POLL_SECONDS)
        raise RuntimeError(f"/ready did not answer {status} within {seconds:g} s")

    async def stop(self, seconds: float) -> int:
        """SIGTERM; the exit status. RuntimeError where it takes longer."""
        self._process.terminate()
        try:
            return await asyncio.to_thread(self._process.wait, seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the server did not stop within {seconds:g} s") from None


@asynccontextmanager
async def victim(model: Path, port: int, options: Sequence[str]) -> AsyncIterator[Victim]:
    """A server that is ready; killed at the end if it still runs."""
    command = [sys.executable, "-P", "-m", "server.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, process_group=0)
    server = Victim(process, f"http://127.0.0.1:{port}")
    try:
        async with aiohttp.ClientSession() as session:
            await server.until(session, 200, START_SECONDS)
        yield server
    finally:
        process.kill()
        process.wait()
