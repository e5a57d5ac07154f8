"""What HTTP processes carry: an engine that computes nothing, and clients that only count."""

from __future__ import annotations

import asyncio
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console

from engine.frontend.tokenizer import Tokenizer
from loadtest.bench.options import DEFAULT_MODEL
from loadtest.errors import Unmeasurable
from loadtest.report import write
from loadtest.servers import allow_connections

ENDED = b"event: done"
CHUNK = 1 << 16
START_SECONDS = 30.0
READY_IN_A_ROW = 32
"""Connections that must all have met a process that is ready."""


@dataclass(frozen=True)
class Carried:
    """Streams of tokens through HTTP processes.

    cpu_seconds: of those processes; tokens_per_core: that one would carry with a core to itself.
    """

    workers: int
    streams: int
    tokens: int
    seconds: float
    cpu_seconds: float
    tokens_per_second: float
    tokens_per_core: float


@dataclass(frozen=True)
class Idle:
    """Streams that wait for their first token; bytes: what the HTTP process grew by."""

    streams: int
    bytes: int
    bytes_per_stream: int


@contextmanager
def workers(
    model: Path, rate: float, count: int = 1
) -> Generator[tuple[int, list[psutil.Process]], None, None]:
    """HTTP processes on one port, before a fake engine; the port and the processes."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ropeway-"))
        address = f"ipc://{folder}/engine"
        engine = [sys.executable, "-P", "-m", "loadtest.bench.fake_engine", address, str(rate)]
        stack.enter_context(_killed(subprocess.Popen(engine)))
        port, listeners = 0, []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(4096)
            port = listener.getsockname()[1]
            listeners.append(listener)
        settings = {"max_queue": 8192, "keep_alive_seconds": 60.0}
        servers = []
        for listener in listeners:
            server = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.processes.worker"],
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(),),
            )
            servers.append(stack.enter_context(_killed(server)))
            config = {"address": address, "model_dir": str(model), "listener": listener.fileno()}
            assert server.stdin is not None
            server.stdin.write(json.dumps(config | {"settings": settings}).encode() + b"\n")
            server.stdin.flush()
        asyncio.run(_until_ready(port, count))
        yield port, [psutil.Process(server.pid) for server in servers]


@contextmanager
def _killed(process: subprocess.Popen[bytes]) -> Generator[subprocess.Popen[bytes], None, None]:
    """At the end."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


async def _until_ready(port: int, count: int) -> None:
    """All of so many processes, of which each connection picks one. Raises Unmeasurable."""
    in_a_row = 0
    try:
        async with asyncio.timeout(START_SECONDS):
            while in_a_row < (1 if count == 1 else READY_IN_A_ROW):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                try:
                    writer.write(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    answer = await reader.read()  # never ends where the process has ended
                finally:
                    writer.close()
                    await writer.wait_closed()
                in_a_row = in_a_row + 1 if b" 200 " in answer.split(b"\r\n", 1)[0] else 0
                await asyncio.sleep(0 if in_a_row else 0.05)
    except TimeoutError:
        raise Unmeasurable(f"the HTTP processes were not ready after {START_SECONDS:g} s") from None


async def _ask(port: int, max_tokens: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """POST /generate, up to the headers of the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=CHUNK)
    body = json.dumps({"prompt": "The old captain", "max_tokens": max_tokens}).encode()
    writer.write(
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RuntimeError(f"the HTTP process refused: {head!r}")
    return reader, writer


async def _follow(port: int, max_tokens: int) -> int:
    """Tokens of one stream, which must end as one that succeeded."""
    reader, writer = await _ask(port, max_tokens)
    tokens, tail = 0, b""
    while chunk := await reader.read(CHUNK):
        text = tail + chunk
        tokens += text.count(b"event: token\n")
        cut = text.rfind(b"event: token\n")
        tail = text[cut + len(b"event: token\n") :] if cut >= 0 else text
        if ENDED in tail:
            break
    writer.close()
    await writer.wait_closed()
    if tokens != max_tokens or ENDED not in tail:
        raise RuntimeError(f"a stream of {max_tokens} tokens ended after {tokens}")
    return tokens


def carry(model: Path, streams: int, rate: float, seconds: float, count: int = 1) -> Carried:
    """As many streams at once as said, each with `rate` tokens a second for so long, through
    `count` HTTP processes."""
    with workers(model, rate, count) as (port, processes):
        max_tokens = max(2, int(rate * seconds))

        async def all_streams() -> int:
            return sum(await asyncio.gather(*(_follow(port, max_tokens) for _ in range(streams))))

        before = _cpu_seconds(processes)
        began = time.monotonic()
        tokens = asyncio.run(all_streams())
        elapsed = time.monotonic() - began
        cpu = _cpu_seconds(processes) - before
    return Carried(count, streams, tokens, elapsed, cpu, tokens / elapsed, tokens / cpu)


def _cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(each.user + each.system for each in times))


def idle(model: Path, streams: int) -> Idle:
    """What so many streams cost that wait."""
    with workers(model, 0) as (port, (process,)):

        async def grow() -> int:
            writers = [(await _ask(port, 64))[1] for _ in range(8)]  # what is loaded once
            before = process.memory_info().rss
            writers += [(await _ask(port, 64))[1] for _ in range(streams)]
            grown = process.memory_info().rss - before
            for writer in writers:
                writer.close()
            await asyncio.gather(*(writer.wait_closed() for writer in writers))
            return int(grown)

        grown = asyncio.run(grow())
    return Idle(streams, grown, grown // streams)


def measure(
    model: Annotated[
        Path, typer.Option(help="Whose tokenizer is used.", show_default="the shipped model")
    ] = DEFAULT_MODEL,
    count: Annotated[int, typer.Option("--workers", min=1, help="HTTP processes.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="Streams at once, per process.")] = 64,
    rate: Annotated[float, typer.Option(min=1, help="Tokens a second of each stream.")] = 500,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of each run.")] = 5,
    runs: Annotated[int, typer.Option(min=1, help="Runs; all are shown.")] = 3,
    idle_streams: Annotated[int, typer.Option(min=1, help="Streams that wait.")] = 1000,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the document there too.")
    ] = None,
) -> None:
    """Tokens/s of server-sent events that HTTP processes carry, and what waiting streams cost one.

    The engine computes nothing, so the HTTP processes are what is measured: by their own processor
    time, which other programs do not disturb much.
    """
    Tokenizer.from_directory(model)  # what is wrong with it is said once, before anything starts
    try:
        allow_connections(max(idle_streams, count * streams))
    except Unmeasurable as error:
        raise typer.BadParameter(str(error)) from error
    console = Console(stderr=True)
    carried = []
    for _ in range(runs):
        last = carry(model, count * streams, rate, seconds, count)
        carried.append(last)
        console.print(
            f"{last.streams} streams, {count} processes: {last.tokens_per_second:,.0f} tokens/s "
            f"with {last.cpu_seconds / last.seconds:.0%} of a core: "
            f"{last.tokens_per_core:,.0f} tokens/s and core",
            soft_wrap=True,
        )
    waiting = idle(model, idle_streams)
    console.print(
        f"{waiting.streams:,} waiting streams: {waiting.bytes / 1e6:.1f} MB, "
        f"{waiting.bytes_per_stream / 1e3:.1f} kB each"
    )
    document = {
        "command": "http",
        "machine": {
            "processor": platform.machine(),
            "cores": psutil.cpu_count(),
            "python": platform.python_version(),
        },
        "carried": [asdict(each) for each in carried],
        "idle": asdict(waiting),
    }
    write(document, json_file)
