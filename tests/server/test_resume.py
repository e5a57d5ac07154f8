"""Streams that outlive their connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.messages import AbortRequest, AddRequest, EngineOutput, TokenLogprobs
from engine.request import FinishReason
from server.access.keys import new_key
from tests.patience import PATIENCE
from tests.server.conftest import SETTINGS, Event, Served, parse_events, running
from tests.server.processes.test_serve import serve, until_whole

MINE = {"X-Request-Id": "mine"}


@asynccontextmanager
async def resumable(
    directory: Path, window: float = 300.0, **settings: Any
) -> AsyncIterator[Served]:
    async with running(directory, replace(SETTINGS, resume_window=window, **settings)) as served:
        await served.until_ready()
        yield served


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Served]:
    async with resumable(tmp_path) as served:
        yield served


async def lose(
    served: Served, body: dict[str, Any], said: bytes, headers: dict[str, str] = MINE
) -> tuple[AddRequest, str]:
    """A client that is lost when the engine has said something; what it has read."""
    async with served.http.stream("POST", "/generate", json=body, headers=headers) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, said)
        text, parts = "", response.aiter_text()
        while text.count("event: token") < len(said):
            text += await anext(parts)
    assert await served.fake.expect(AbortRequest) == AbortRequest(request.request_id)
    return request, text


async def test_a_lost_client_gives_its_pages_back_and_goes_on(kept: Served) -> None:
    body = {"prompt": "ab", "seed": 7, "stop": "never", "max_tokens": 9, "echo": True}
    first, text = await lose(kept, body, b"xyz")
    seen = parse_events(text)
    assert [event.event for event in seen] == ["prompt", "token", "token", "token"]
    headers = {"Last-Event-ID": "1"}
    async with kept.http.stream("GET", "/generate/mine", headers=headers) as response:
        assert response.status_code == 200
        second = await kept.fake.expect(AddRequest)
        assert second.request_id != first.request_id
        assert second.output_token_ids == [*b"xyz"]
        assert (second.seed, second.prompt_token_ids, second.max_tokens) == (7, [*b"ab"], 9)
        assert second.elapsed_s > 0
        await kept.fake.step(EngineOutput(first.request_id, 3, ord("?")))  # late, from before
        await kept.fake.say(second, b"!.", start=3, end=FinishReason.STOP)
        events = parse_events((await response.aread()).decode())
    assert [event.id for event in events] == ["2", "3", "4", None]
    assert [event.data["text"] for event in events[:-1]] == ["z", "!", "."]
    assert events[-1].event == "done"
    assert events[-1].data["usage"]["completion_tokens"] == 5
    assert kept.fake.quiet
    again = await kept.http.get("/generate/mine")  # the end may have been lost as well
    replayed = parse_events(again.text)
    assert [event.event for event in replayed] == ["prompt", *["token"] * 5, "done"]
    metrics = (await kept.http.get("/metrics")).text
    assert 'ropeway_requests_total{outcome="stop"} 1.0' in metrics
    assert 'outcome="aborted"' not in metrics


async def test_several_choices(kept: Served) -> None:
    async with kept.http.stream(
        "POST", "/generate", json={"prompt": "ab", "n": 2}, headers=MINE
    ) as response:
        first, second = [await kept.fake.expect(AddRequest) for _ in range(2)]
        logprobs = TokenLogprobs(-1.0, [])
        await kept.fake.step(EngineOutput(second.request_id, 0, ord("q"), None, logprobs, 0.0))
        text, parts = "", response.aiter_text()
        while "0.1.0" not in text:
            text += await anext(parts)
        await kept.fake.say(first, b"x", end=FinishReason.LENGTH)
        while "event: finish" not in text:
            text += await anext(parts)
    await kept.fake.expect(AbortRequest)
    headers = {"Last-Event-ID": "0.1.0"}
    async with kept.http.stream("GET", "/generate/mine", headers=headers) as response:
        added = await kept.fake.expect(AddRequest)
        assert (added.choice, added.output_token_ids) == (1, [ord("q")])
        await kept.fake.say(added, b"r", start=1, end=FinishReason.LENGTH)
        events = parse_events((await response.aread()).decode())
    assert [event.event for event in events] == ["token", "finish", "token", "finish", "done"]
    assert [event.id for event in events if event.id] == ["0.0.0", "0.1.1"]
    assert events[-1].data["usage"]["completion_tokens"] == 3


async def test_two_may_read_at_once(kept: Served) -> None:
    """A connection that is dead without anybody's knowing keeps nobody from going on."""
    async with kept.http.stream(
        "POST", "/generate", json={"prompt": "ab"}, headers=MINE
    ) as response:
        request = await kept.fake.expect(AddRequest)
        await kept.fake.say(request, b"x")
        async with kept.http.stream("GET", "/generate/mine") as other:
            await kept.fake.say(request, b"y", start=1, end=FinishReason.LENGTH)
            texts = [(await each.aread()).decode() for each in (response, other)]
    assert texts[0] == texts[1]
    assert kept.fake.quiet


async def test_nobody_comes_back(tmp_path: Path) -> None:
    async with resumable(tmp_path, window=0.1) as served:
        await lose(served, {"prompt": "ab"}, b"x")
        async with asyncio.timeout(PATIENCE):  # not by asking for it, which would keep it
            while 'outcome="aborted"} 1.0' not in (await served.http.get("/metrics")).text:
                await asyncio.sleep(0.01)
        answer = await served.http.get("/generate/mine")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")
        assert "0.1 s" in answer.json()["error"]["message"]


async def test_only_the_key_that_made_it(tmp_path: Path) -> None:
    alice, alice_key = new_key("alice", None, None)
    bob, bob_key = new_key("bob", None, None)
    (tmp_path / "keys").write_text(f"{alice_key.line}\n{bob_key.line}\n")
    async with resumable(tmp_path, api_key_file=str(tmp_path / "keys")) as served:
        mine = {"Authorization": f"Bearer {alice}"}
        await lose(served, {"prompt": "ab"}, b"x", mine | MINE)
        other = {"Authorization": f"Bearer {bob}"}
        answer = await served.http.get("/generate/mine", headers=other)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "stream_not_found")
        async with served.http.stream("GET", "/generate/mine", headers=mine) as response:
            assert response.status_code == 200
            await served.fake.expect(AddRequest)


async def test_what_cannot_be_resumed(kept: Served) -> None:
    await lose(kept, {"prompt": "ab"}, b"x")
    twice = await kept.http.post("/generate", json={"prompt": "ab"}, headers=MINE)
    assert (twice.status_code, twice.json()["error"]["code"]) == (409, "request_id_in_use")
    for wrong in ("5", "0.0.0", "x"):
        headers = {"Last-Event-ID": wrong}
        answer = await kept.http.get("/generate/mine", headers=headers)
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, "Last-Event-ID")
        assert wrong in answer.json()["error"]["message"]
    assert kept.fake.quiet
    await kept.fake.die()
    async with asyncio.timeout(PATIENCE):
        while (await kept.http.get("/ready")).status_code != 503:
            await asyncio.sleep(0.01)
    dead = await kept.http.get("/generate/mine")
    assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_dead")


async def test_off_by_default(served: Served) -> None:
    await lose(served, {"prompt": "ab"}, b"x")
    assert (await served.http.get("/generate/mine")).status_code == 404


async def test_through_any_process_and_to_the_bit(tiny_model_dir: Path) -> None:
    """Each connection picks one of two processes; the pages are free while nobody reads."""
    body = {"prompt": "the a", "max_tokens": 60, "ignore_eos": True, "logprobs": 1}
    options = ["--api-workers", "2", "--resume-window", "300", "--max-num-seqs", "4"]
    with serve(tiny_model_dir, *options) as server:
        async with server.client() as client:
            client.headers["Connection"] = "close"
            for attempt in range(6):
                ours = body | {"seed": attempt, "frequency_penalty": 0.5}
                whole = parse_events((await client.post("/generate", json=ours)).text)
                name, events = f"stream-{attempt}", list[Event]()
                events += await some(client, "POST", "/generate", name, json=ours)
                await until_whole(client)
                while events[-1].event != "done":
                    headers = {"Last-Event-ID": str(events[-1].id)}
                    events += await some(client, "GET", f"/generate/{name}", "x", headers=headers)
                assert [event.data for event in events[:-1]] == [e.data for e in whole[:-1]]


async def some(
    client: httpx.AsyncClient, method: str, path: str, name: str, **settings: Any
) -> list[Event]:
    """The first twenty events or so of a stream that is then left."""
    headers = settings.pop("headers", {}) | {"X-Request-Id": name}
    text = ""
    async with client.stream(method, path, headers=headers, **settings) as response:
        assert response.status_code == 200, await response.aread()
        async for part in response.aiter_text():
            text += part
            if text.count("\n\n") > 20 and text.endswith("\n\n"):
                break
    return parse_events(text)
