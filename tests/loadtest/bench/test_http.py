"""The benchmark of the HTTP process measures what it says."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import TokenizerError
from loadtest.bench import http
from loadtest.bench.commands import app
from loadtest.errors import Unmeasurable


@pytest.mark.parametrize("workers", [1, 2])
def test_one_short_run(tiny_model_dir: Path, workers: int) -> None:
    options = ["--model", str(tiny_model_dir), "--workers", str(workers)]
    options += ["--streams", "4", "--rate", "50", "--seconds", "0.4", "--runs", "1"]
    result = CliRunner().invoke(app, ["http", *options, "--idle-streams", "10"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (carried,) = document["carried"]
    assert carried["workers"] == workers
    assert carried["tokens"] == workers * 4 * 20
    assert carried["tokens_per_second"] > 0
    assert carried["tokens_per_core"] > carried["tokens_per_second"]
    assert document["idle"]["streams"] == 10


async def test_a_stream_that_is_cut_off_counts_for_nothing() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nid: 0\nevent: token\ndata: {}\n\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RuntimeError, match="ended after 1"):
            await http._follow(port, 2)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer.tiktoken in it"):
        CliRunner().invoke(app, ["http", "--model", str(tmp_path)], catch_exceptions=False)


async def test_processes_that_never_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "START_SECONDS", 0.2)
    late = pytest.raises(Unmeasurable, match=r"not ready after 0\.2 s")
    with socket.create_server(("127.0.0.1", 0)) as listener, late:
        await http._until_ready(listener.getsockname()[1], 1)
