"""kill -9 under load, and requests that kill: streams go on as if nothing had happened."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine import AsyncEngine, SamplingParams
from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import EngineDead, EngineStarting, PoisonedRequest
from engine.frontend import client as frontend_client
from engine.frontend.connection import Connection
from engine.frontend.process import EngineProcess, Supervisor
from engine.frontend.stream import Stream
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AbortRequest, AddRequest, EngineOutput, Hello
from engine.request import FinishReason
from tests.engine.poisoned_core import LOSES, POISON
from tests.patience import PATIENCE
from tests.server.conftest import Event, parse_events
from tests.server.fake_engine import READY, FakeEngine, byte_tokenizer
from tests.server.processes.test_serve import Server, gauge, serve, until_all_are_ready, until_whole

ROOT = Path(__file__).parents[3]
ROPES = (
    None,
    {"type": "dynamic", "factor": 5, "original_context": 40},  # changes at 41, 81 and 161 tokens
    {"type": "yarn", "factor": 2},
    None,
)


def engine_of(server: Server) -> psutil.Process:
    (engine,) = [each for each in server.children() if "engine.core" in each.cmdline()]
    return engine


async def follow(client: httpx.AsyncClient, body: dict[str, Any], seen: list[int]) -> list[Event]:
    async with client.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200, await response.aread()
        text = ""
        async for part in response.aiter_text():
            text += part
            seen.append(part.count("event: token"))
        return parse_events(text)


async def test_kill_under_load(tiny_model_dir: Path) -> None:
    """A pool too small by half, two kills; every stream says what it says alone."""
    options = ["--block-size", "16", "--kv-memory", "512KiB", "--max-num-seqs", "24"]
    bodies = [
        {
            "prompt": "the " * (1 + at % 7) + "in",
            "max_tokens": 150,
            "ignore_eos": True,
            "seed": at,
            "frequency_penalty": 0.2 * (at % 3),
            "rope": ROPES[at % 4],
        }
        for at in range(24)
    ]
    with serve(tiny_model_dir, *options) as server:
        async with server.client() as client:
            alone = [
                (await client.post("/generate", json=body | {"stream": False})).json()
                for body in bodies
            ]
            seen: list[int] = []
            streams = [asyncio.create_task(follow(client, body, seen)) for body in bodies]
            for count in (200, 1500):
                async with asyncio.timeout(PATIENCE):
                    while sum(seen) < count:
                        await asyncio.sleep(0.005)
                engine_of(server).kill()
                assert await until(client, 503) == "engine_starting"
                refused = await client.post("/generate", json=bodies[0])
                assert refused.status_code == 503
                assert refused.headers["retry-after"] == "1"
                assert (await client.get("/health")).status_code == 200
                assert await until(client, 200) == ""
            together = await asyncio.gather(*streams)
            await until_whole(client)
            assert await gauge(client, "engine_deaths_total") == 2
        for expected, (*tokens, done) in zip(alone, together, strict=True):
            assert done.event == "done"
            assert [event.id for event in tokens] == [str(index) for index in range(150)]
            assert [event.data["token_id"] for event in tokens] == expected["token_ids"]
            assert "".join(event.data["text"] for event in tokens) == expected["text"]
            assert done.data["usage"]["completion_tokens"] == 150


async def until(client: httpx.AsyncClient, status: int) -> str:
    """Wait for /ready to say so; the error's code."""
    async with asyncio.timeout(PATIENCE):
        while (answer := await client.get("/ready")).status_code != status:
            await asyncio.sleep(0.01)
    return "" if status == 200 else str(answer.json()["error"]["code"])


@asynccontextmanager
async def mortal_engine(directory: Path, max_restarts: int) -> AsyncIterator[AsyncEngine]:
    process = EngineProcess(
        EngineConfig(
            model_dir=str(directory),
            device="cpu",
            dtype="float32",
            threads=1,
            cache=CacheConfig(block_size=16),
            scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        ),
        "tests.engine.poisoned_core",
    )
    process.start()
    engine = AsyncEngine(
        Tokenizer.from_directory(directory), process.address, max_queue=99, recovers=True
    )
    supervisor = Supervisor(process, max_restarts)

    async def supervise() -> None:
        while supervisor.poll() is None:
            await asyncio.sleep(0.02)

    await engine.start(process.exit_status)
    supervising = asyncio.create_task(supervise())
    try:
        yield engine
    finally:
        supervising.cancel()
        await engine.close()
        process.stop()


async def collect(stream: Stream) -> list[int]:
    return [delta.token_id async for deltas in stream for delta in deltas]


@pytest.mark.parametrize("name", ["bad", LOSES])
async def test_only_the_poisoned_request_fails(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where the last token before each death is lost with the process."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    params = SamplingParams(seed=4, max_tokens=60, ignore_eos=True)
    async with mortal_engine(tiny_model_dir, 5) as engine:
        alone = [
            await collect(engine.submit(f"alone {at}", [20 + at] * 9, params)) for at in range(5)
        ]
        good = [engine.submit(f"good {at}", [20 + at] * 9, params) for at in range(5)]
        bad = engine.submit(name, [POISON] * 9, params)
        together = await asyncio.gather(*(collect(stream) for stream in good))
        with pytest.raises(PoisonedRequest) as caught:
            await collect(bad)
        assert caught.value.code == "poisoned_request"
        assert together == alone
        assert engine.deaths == 2  # with the others, and alone
        assert engine.num_unfinished == 0


async def test_streams_are_handed_to_the_next_engine(tmp_path: Path) -> None:
    """What is sent again: with its output, its age and what it is suspected of; nothing closed."""
    fake = FakeEngine(tmp_path)
    fake.bind()
    engine = AsyncEngine(byte_tokenizer(), fake.address, max_queue=9, recovers=True)
    starting = asyncio.create_task(engine.start(lambda: None))
    try:
        await fake.ready()
        await starting
        streams = [engine.submit(name, "ab", SamplingParams(seed=1)) for name in "abc"]
        requests = [await fake.expect(AddRequest) for _ in streams]
        await fake.say(requests[0], b"xy")
        assert [delta.text for delta in await anext(streams[0])]
        while streams[0].usage.completion_tokens < 2:
            await asyncio.sleep(0.01)
        await fake.die()
        async with asyncio.timeout(PATIENCE):
            while engine.ready is not None:
                await asyncio.sleep(0.01)
        with pytest.raises(EngineStarting, match="again after a crash"):
            engine.submit("d", "ab", SamplingParams())
        streams[1].close()
        fake.open()
        await fake.expect(Hello)
        await fake.expect(AbortRequest)
        await fake.welcome(READY, suspects={"a": 3}, poisoned=[])
        again = [await fake.expect(AddRequest) for _ in range(2)]
        assert [(each.request_id, each.output_token_ids, each.suspect_at) for each in again] == [
            ("a", list(b"xy"), 3),
            ("c", [], None),
        ]
        assert all(0 < each.elapsed_s < PATIENCE for each in again)
        assert again[0].seed == requests[0].seed
        await fake.say(again[0], b"z", start=2, end=FinishReason.LENGTH)
        assert (await collect(streams[0]))[-1:] == list(b"z")
        assert streams[0].usage.completion_tokens == 3
    finally:
        await engine.close()
        await fake.close()


async def test_a_broken_message_is_no_death_to_recover_from(tmp_path: Path) -> None:
    """The reader is gone for good: no stream may wait for another engine."""
    fake = FakeEngine(tmp_path)
    fake.bind()
    engine = AsyncEngine(byte_tokenizer(), fake.address, max_queue=9, recovers=True)
    starting = asyncio.create_task(engine.start(lambda: None))
    try:
        await fake.ready()
        await starting
        stream = engine.submit("a", "ab", SamplingParams())
        request = await fake.expect(AddRequest)
        await fake.step(EngineOutput(request.request_id, 0, 999_999))
        with pytest.raises(EngineDead, match="the connection to the engine broke: KeyError"):
            await asyncio.wait_for(collect(stream), PATIENCE)
        with pytest.raises(EngineDead):
            engine.submit("b", "ab", SamplingParams())
        assert (engine.alive, engine.num_unfinished, engine.deaths) == (False, 0, 0)
    finally:
        await engine.close()
        await fake.close()


async def test_every_http_worker_recovers_until_restarts_are_used_up(tiny_model_dir: Path) -> None:
    body = {"prompt": "the a", "max_tokens": 180, "ignore_eos": True, "temperature": 0}
    endless = {"prompt": "the a", "overflow": "shift", "ignore_eos": True}
    options = ["--api-workers", "2", "--max-restarts", "1", "--block-size", "16"]
    with serve(tiny_model_dir, *options) as server:
        async with server.client() as client:

            async def streams(count: int, body: dict[str, Any]) -> list[list[Event]]:
                """Streams at once, with a kill once all have begun; what each had."""
                seen: list[list[int]] = [[] for _ in range(count)]
                following = [asyncio.create_task(follow(client, body, each)) for each in seen]
                async with asyncio.timeout(PATIENCE):
                    while not all(sum(each) for each in seen):
                        await asyncio.sleep(0.002)
                engine_of(server).kill()
                return await asyncio.gather(*following)

            for *tokens, done in await streams(12, body):
                assert (done.event, len(tokens)) == ("done", 180)
                assert len({event.data["index"] for event in tokens}) == 180
            until_all_are_ready(server.url)
            for *tokens, error in await streams(12, endless):
                assert (error.event, error.data["code"]) == ("error", "engine_dead")
                assert tokens
        assert server.end() == (1, "error: the engine process ended with status -9\n")


async def test_a_worker_that_dies_is_the_cause_that_is_told(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir, "--api-workers", "2") as server:
        (worker,) = [
            each for each in server.children() if "server.processes.worker" in each.cmdline()
        ]
        worker.kill()
        assert server.end() == (1, "error: an HTTP worker process ended\n")


@pytest.mark.parametrize("turns", range(6))
async def test_closing_while_the_engine_dies_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """One that is left open would keep close() waiting for ever. turns: of the loop, between."""
    connections: list[Connection] = []
    lost = asyncio.Event()

    class Watched(Connection):
        def __init__(self, *of: Any) -> None:
            super().__init__(*of)
            connections.append(self)

        async def lost(self) -> None:
            await lost.wait()

    monkeypatch.setattr(frontend_client, "Connection", Watched)
    fake = FakeEngine(tmp_path)
    fake.bind()
    engine = AsyncEngine(byte_tokenizer(), fake.address, max_queue=9, recovers=True)
    starting = asyncio.create_task(engine.start(lambda: None))
    await fake.ready()
    await starting
    lost.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    assert engine._running is not None
    engine._running.cancel()
    await asyncio.gather(engine._running, return_exceptions=True)
    assert all(each._socket.closed for each in connections)
    await engine.close()
    await fake.close()
