"""Streams of other servers are counted by what their lines say, and failures are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from loadtest.client import ROPEWAY, Dialect, LlamaCpp, OpenAI, run_http
from loadtest.errors import Unmeasurable
from loadtest.workload import Workload

# as llama-server and vLLM send them, shortened; the second line of each brings two tokens
LLAMA = [
    b'data: {"index":0,"content":"a","tokens":[5],"stop":false,"tokens_predicted":1}\n\n',
    b'data: {"index":0,"content":"bc","tokens":[6],"stop":false,"tokens_predicted":3}\n\n',
    b'data: {"index":0,"content":"","tokens":[],"stop":true,"tokens_predicted":3}\n\n',
]
VLLM = [
    b'data: {"choices":[{"text":"a"}],"usage":{"prompt_tokens":4,"completion_tokens":1}}\n\n',
    b'data: {"choices":[{"text":"b"}],"usage":{"prompt_tokens":4,"completion_tokens":3}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":3}}\n\ndata: [DONE]\n\n',
]
OURS = [b"id: 0\nevent: token\ndata: {}\n\n", b"event: token\ndata: {}\n\n" * 2, b"event: done\n\n"]
WORKLOAD = Workload(streams=2, prompt_tokens=4, output_tokens=3, vocab_size=9)


@asynccontextmanager
async def server(
    path: str, lines: list[bytes], status: int = 200, bodies: list[object] | None = None
) -> AsyncIterator[str]:
    """Answers every POST with these lines; yields its URL. bodies: collects the requests."""

    async def answer(request: web.Request) -> web.StreamResponse:
        if bodies is not None:
            bodies.append(await request.json())
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for line in lines:
            await response.write(line)
            await asyncio.sleep(0.001)
        return response

    application = web.Application()
    application.router.add_post(path, answer)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


DIALECTS = [(ROPEWAY, OURS), (LlamaCpp(), LLAMA), (OpenAI("model"), VLLM)]


@pytest.mark.parametrize(("dialect", "lines"), DIALECTS)
async def test_tokens_are_counted(dialect: Dialect, lines: list[bytes]) -> None:
    bodies: list[object] = []
    async with server(dialect.path, lines, bodies=bodies) as url:
        measured = await run_http(url, WORKLOAD, 0, dialect)
    assert {stream: len(times) for stream, times in measured.arrivals.items()} == {0: 3, 1: 3}
    prompts = [body["prompt"] for body in bodies if isinstance(body, dict)]
    assert sorted(prompts) == sorted(WORKLOAD.prompts(0))


@pytest.mark.parametrize(("dialect", "lines"), DIALECTS)
async def test_a_short_stream_is_no_figure(dialect: Dialect, lines: list[bytes]) -> None:
    async with server(dialect.path, lines[:1]) as url:
        with pytest.raises(Unmeasurable, match="a stream had 1 tokens, not 3"):
            await run_http(url, WORKLOAD, 0, dialect)


@pytest.mark.parametrize(
    ("dialect", "line", "message"),
    [
        (ROPEWAY, b"event: error\ndata: {}\n\n", "error event"),
        (LlamaCpp(), b'error: {"error":{"code":500,"message":"no slot"}}\n\n', "no slot"),
        (OpenAI("model"), b'data: {"error":{"message":"too long"}}\n\n', "too long"),
    ],
)
async def test_errors(dialect: Dialect, line: bytes, message: str) -> None:
    async with server(dialect.path, [line]) as url:
        with pytest.raises(Unmeasurable, match=message):
            await run_http(url, WORKLOAD, 0, dialect)


async def test_a_refusal_is_told() -> None:
    async with server("/generate", [b"the queue is full"], status=429) as url:
        with pytest.raises(Unmeasurable, match="429: the queue is full"):
            await run_http(url, WORKLOAD, 0)


async def test_nobody_there() -> None:
    with pytest.raises(Unmeasurable, match=r"127\.0\.0\.1:9"):
        await run_http("http://127.0.0.1:9", WORKLOAD, 0)
