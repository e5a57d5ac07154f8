"""Clients that go, that read slowly, and an engine that dies."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from engine.errors import Draining
from engine.messages import AbortRequest, AddRequest, EngineOutput, EngineStats
from engine.request import FinishReason
from server.errors import status_of
from tests.patience import PATIENCE
from tests.server.conftest import SETTINGS, Served, parse_events, running


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_is_noticed_while_no_token_comes(
    served: Served, stream: bool
) -> None:
    async with served.raw({"prompt": "a", "stream": stream}) as (_, writer):
        request = await served.fake.expect(AddRequest)
        await asyncio.sleep(0.05)
        assert served.fake.quiet
        writer.transport.abort()
        abort = await served.fake.expect(AbortRequest)
    assert abort.request_id == request.request_id
    assert served.service.engine.num_unfinished == 0
    metrics = (await served.http.get("/metrics")).text
    assert 'ropeway_requests_total{outcome="aborted"} 1.0' in metrics


async def test_a_client_that_goes_between_tokens(served: Served) -> None:
    async with served.raw({"prompt": "a"}) as (reader, _):
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"x")
        await reader.readuntil(b'"text":"x"}\n\n')
    assert await served.fake.expect(AbortRequest) == AbortRequest(request.request_id)


async def test_a_finished_request_is_not_aborted(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"x", end=FinishReason.LENGTH)
        await response.aread()
    await asyncio.sleep(0.05)
    assert served.fake.quiet


async def test_a_stop_string_aborts_in_the_engine(served: Served) -> None:
    body = {"prompt": "a", "stop": ["END"]}
    async with served.http.stream("POST", "/generate", json=body) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"one EN two END three")
        *tokens, done = parse_events((await response.aread()).decode())
    assert "".join(event.data["text"] for event in tokens) == "one EN two "
    assert done.data["finish_reason"] == "stop"
    assert await served.fake.expect(AbortRequest) == AbortRequest(request.request_id)


async def test_a_slow_reader_gets_joined_events(served: Served) -> None:
    """What cannot be written waits in the stream and then goes out in few writes."""
    count = 10_000
    async with served.raw({"prompt": "a"}) as (reader, _):
        request = await served.fake.expect(AddRequest)
        for start in range(0, count, 100):
            await served.fake.say(request, b"x" * 100, start=start)
            await asyncio.sleep(0.002)
        async with asyncio.timeout(PATIENCE):
            while len(served.service.engine._streams[request.request_id]._waiting) < 2000:
                await asyncio.sleep(0.01)
        await served.fake.say(request, b"y", start=count, end=FinishReason.LENGTH)
        content = b""
        while not content.endswith(b"\r\n0\r\n\r\n"):
            content += await asyncio.wait_for(reader.read(1 << 16), PATIENCE)
    body = content.partition(b"\r\n\r\n")[2]
    sizes = [int(size, 16) for size in re.findall(rb"(?:^|\r\n)([0-9a-f]+)\r\n(?=id|event)", body)]
    assert max(sizes) > 1 << 16  # a thousand tokens and more in one write
    assert body.count(b"event: token") == count + 1
    assert body.count(b"event: done") == 1


async def test_who_does_not_read_cannot_keep_the_server_from_ending(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        asyncio.timeout(PATIENCE),
        AsyncExitStack() as client,
        running(tmp_path, SETTINGS) as served,
    ):
        await served.until_ready()
        await client.enter_async_context(served.raw({"prompt": "a"}))
        request = await served.fake.expect(AddRequest)
        for start in range(0, 10_000, 100):
            await served.fake.say(request, b"x" * 100, start=start)
            await asyncio.sleep(0)
    assert not caplog.records


async def test_engine_death_ends_a_stream_by_an_error(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"ab")
        parts = response.aiter_text()
        text = ""
        while '"index":1' not in text:
            text += await anext(parts)
        await served.fake.die()
        text += "".join([part async for part in parts])
    *tokens, error = parse_events(text)
    assert [event.data["text"] for event in tokens] == ["a", "b"]
    assert error.event == "error"
    assert error.data["code"] == "engine_dead"
    assert set(error.data) == {"code", "message"}
    for path in ("/health", "/ready"):
        answer = await served.http.get(path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
    answer = await served.http.post("/generate", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


async def test_a_broken_message_ends_streams_and_says_so(served: Served) -> None:
    """No stream may wait for a reader that is gone."""
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.step(EngineOutput(request.request_id, 0, 999_999))
        text = await response.aread()
    assert b"event: error" in text
    assert b"the connection to the engine broke: KeyError" in text
    assert (await served.http.get("/health")).status_code == 503


async def test_engine_death_answers_a_waiting_client(served: Served) -> None:
    body = {"prompt": "a", "stream": False}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    await served.fake.expect(AddRequest)
    await served.fake.die()
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


async def test_starting(starting: Served) -> None:
    assert (await starting.http.get("/health")).json() == {"status": "ok"}
    for method, path in (("GET", "/ready"), ("POST", "/generate")):
        answer = await starting.http.request(method, path, json={"prompt": "a"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_starting"
        assert answer.headers["retry-after"] == "1"
    await starting.until_ready()


async def test_an_engine_that_cannot_start(starting: Served) -> None:
    starting.fake.exit_status = 1
    async with asyncio.timeout(PATIENCE):
        while (await starting.http.get("/health")).status_code != 503:
            await asyncio.sleep(0.01)
    for path in ("/health", "/ready"):
        answer = await starting.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_start")


async def test_draining_takes_nothing_new_and_finishes_what_runs(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        served.service.drain()
        for method, path in (("GET", "/ready"), ("POST", "/generate")):
            answer = await served.http.request(method, path, json={"prompt": "a"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert (await served.http.get("/health")).status_code == 200
        await served.fake.say(request, b"x", end=FinishReason.LENGTH)
        events = parse_events((await response.aread()).decode())
    assert [event.event for event in events] == ["token", "done"]


async def test_draining_for_too_long_is_an_error_event(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        await served.fake.expect(AddRequest)
        served.service.engine.fail(Draining("the server shut down"))
        (event,) = parse_events((await response.aread()).decode())
    assert (event.event, event.data["code"]) == ("error", "draining")
    assert status_of(Draining("")) == 503


async def test_metrics(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        text, parts = "", response.aiter_text()
        for index, token_id in enumerate(b"abc"):
            end = FinishReason.LENGTH if index == 2 else None
            await served.fake.say(request, [token_id], start=index, end=end)
            while f'"index":{index}' not in text:  # two that come at once have no gap
                text += await anext(parts)
        text += "".join([part async for part in parts])
    stats = EngineStats(
        running=1,
        waiting=2,
        blocks_total=8,
        blocks_free=3,
        blocks_cached=4,
        steps=40,
        preemptions=5,
        prompt_tokens=60,
        output_tokens=70,
        prefix_queries=60,
        prefix_hits=20,
    )
    await served.fake.step(stats=stats)
    async with asyncio.timeout(PATIENCE):
        while served.service.engine.stats != stats:
            await asyncio.sleep(0.01)
    response = await served.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for line in (
        "ropeway_num_requests_running 1.0",
        "ropeway_num_requests_waiting 2.0",
        "ropeway_open_streams 0.0",
        "ropeway_kv_blocks_used 5.0",
        "ropeway_kv_blocks_free 3.0",
        "ropeway_kv_blocks_cached 4.0",
        "ropeway_prefix_cache_queries_total 60.0",
        "ropeway_prefix_cache_hits_total 20.0",
        "ropeway_preemptions_total 5.0",
        "ropeway_prompt_tokens_total 60.0",
        "ropeway_generation_tokens_total 70.0",
        'ropeway_requests_total{outcome="length"} 1.0',
        "ropeway_time_to_first_token_seconds_count 1.0",
        "ropeway_inter_token_latency_seconds_count 2.0",
        "ropeway_request_queue_time_seconds_sum 0.25",
    ):
        assert f"\n{line}\n" in response.text, line
