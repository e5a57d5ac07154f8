"""POST /generate before a played engine: the wire format."""

from __future__ import annotations

import asyncio

import pytest

from engine.messages import AddRequest, EngineOutput, TokenLogprobs
from engine.params import RequestOptions
from engine.request import FinishReason
from engine.scaling import RopeScaling
from tests.server.conftest import Served, parse_events
from tests.server.fake_engine import EOS

OPTIONS = RequestOptions.__struct_fields__


async def test_events_are_those_of_the_contract(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "ab"}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        request = await served.fake.expect(AddRequest)
        assert len(response.headers["x-request-id"]) == 32
        assert request.prompt_token_ids == list(b"ab")
        await served.fake.say(request, b"hi", end=FinishReason.LENGTH)
        body = "".join([part async for part in response.aiter_text()])
    first, second, done = parse_events(body)
    assert body.startswith('id: 0\nevent: token\ndata: {"index":0,"token_id":104,"text":"h"}\n\n')
    assert (second.id, second.event) == ("1", "token")
    assert second.data == {"index": 1, "token_id": ord("i"), "text": "i"}
    assert first.data["index"] == 0
    assert (done.id, done.event) == (None, "done")
    assert done.data["finish_reason"] == "length"
    assert done.data["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "cached_tokens": 0,
        "dropped_tokens": 0,
    }
    timing = done.data["timing"]
    assert timing["queue_s"] == 0.25
    assert timing["prefill_s"] == max(0, timing["first_token_s"] - 0.25)
    assert 0 < timing["first_token_s"] <= timing["total_s"] < 5
    between = timing["total_s"] - timing["first_token_s"]
    assert timing["per_token_s"] == pytest.approx(between, abs=2e-6)


async def test_json_has_the_same_content(served: Served) -> None:
    body = {"prompt": [1, 2, 3], "stream": False, "stop_token_ids": [7]}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    request = await served.fake.expect(AddRequest)
    await served.fake.say(request, [*b"hi", EOS], end=FinishReason.STOP)
    response = await asking
    assert response.status_code == 200
    answer = response.json()
    assert answer.pop("timing")["queue_s"] == 0.25
    assert answer == {
        "request_id": response.headers["x-request-id"],
        "text": "hi",
        "token_ids": [*b"hi", EOS],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "cached_tokens": 0,
            "dropped_tokens": 0,
        },
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_where_asked_for(served: Served, stream: bool) -> None:
    body = {"prompt": "a", "logprobs": 2, "stream": stream}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    request = await served.fake.expect(AddRequest)
    assert request.params.logprobs == 2
    logprobs = TokenLogprobs(-0.5, [(0x62, -0.5), (0xC3, -1.5)])
    await served.fake.step(
        EngineOutput(request.request_id, 0, 0x62, FinishReason.LENGTH, logprobs, 0.0)
    )
    response = await asking
    top = [
        {"token_id": 0x62, "token": "b", "logprob": -0.5},
        {"token_id": 0xC3, "token": "\ufffd", "logprob": -1.5},
    ]
    if stream:
        token, _ = parse_events(response.text)
        assert token.data["logprob"] == -0.5
        assert token.data["top_logprobs"] == top
    else:
        assert response.json()["logprobs"] == [
            {"token_id": 0x62, "token": "b", "logprob": -0.5, "top_logprobs": top}
        ]


async def test_every_sampling_field_arrives(served: Served) -> None:
    fields = {
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "seed": 2**64 - 1,
        "stop_token_ids": [3, 4],
        "max_tokens": 9,
        "ignore_eos": True,
        "logprobs": 0,
        "priority": -3,
        "timeout_s": 2.5,
        "overflow": "truncate",
        "cache_salt": "mine",
    }
    body = {"prompt": "a", "stop": "x", "logit_bias": {"7": -100, "8": 1.5}, **fields}
    async with served.http.stream("POST", "/generate", json=body):
        request = await served.fake.expect(AddRequest)
    assert request.params.logit_bias == {7: -100, 8: 1.5}
    assert request.params.stop == ("x",)
    assert request.seed == 2**64 - 1
    for name, value in fields.items():
        owner = request.options if name in OPTIONS else request.params
        assert getattr(owner, name) == (tuple(value) if name == "stop_token_ids" else value)


async def test_never_half_a_character(served: Served) -> None:
    text = "é€🚡"
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, text.encode(), end=FinishReason.LENGTH)
        events = parse_events((await response.aread()).decode())[:-1]
    assert [event.data["text"] for event in events] == ["", "é", "", "", "€", "", "", "", "🚡"]


async def test_lines_in_the_text_do_not_break_the_events(served: Served) -> None:
    text = "a\n\nevent: done\r\n\u2028\0"
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, text.encode(), end=FinishReason.LENGTH)
        *tokens, done = parse_events((await response.aread()).decode())
    assert "".join(event.data["text"] for event in tokens) == text
    assert done.event == "done"


async def test_silence_is_broken_by_comments(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a"}) as response:
        request = await served.fake.expect(AddRequest)
        parts = response.aiter_text()
        assert (await anext(parts)).startswith(": waiting\n\n")  # one, or several
        await served.fake.say(request, b"b", end=FinishReason.LENGTH)
        rest = "".join([part async for part in parts])
    assert [event.event for event in parse_events(rest)] == ["token", "done"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_timeout_is_a_finish_reason(served: Served, stream: bool) -> None:
    body = {"prompt": "a", "timeout_s": 0.5, "stream": stream}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    request = await served.fake.expect(AddRequest)
    await served.fake.say(request, b"h")
    await served.fake.step(EngineOutput(request.request_id, 1, None, FinishReason.TIMEOUT))
    response = await asking
    if stream:
        token, done = parse_events(response.text)
        assert token.data["text"] == "h"
        assert done.event == "done"
        answer = done.data
    else:
        answer = response.json()
        assert answer["text"] == "h"
        assert answer["token_ids"] == [ord("h")]
    assert answer["finish_reason"] == "timeout"
    assert answer["usage"]["completion_tokens"] == 1
    assert 'outcome="timeout"} 1.0' in (await served.http.get("/metrics")).text


async def test_several_prompts_and_choices(served: Served) -> None:
    """Three streams of one answer: two choices of the first prompt would be 4, so n is 1 here."""
    body = {"prompt": ["ab", [7]], "echo": True}
    async with served.http.stream("POST", "/generate", json=body) as response:
        first = await served.fake.expect(AddRequest)
        second = await served.fake.expect(AddRequest)
        assert [first.prompt_token_ids, second.prompt_token_ids] == [[*b"ab"], [7]]
        await served.fake.say(second, b"x", end=FinishReason.LENGTH)
        await served.fake.say(first, b"yz", end=FinishReason.LENGTH)
        events = parse_events((await response.aread()).decode())
    prompts, rest = events[:2], events[2:]
    assert [event.data for event in prompts] == [
        {"token_ids": [*b"ab"], "text": "ab", "prompt": 0},
        {"token_ids": [7], "text": "\x07", "prompt": 1},
    ]
    tokens = [event for event in rest if event.event == "token"]
    assert {event.id for event in tokens} == {"1.0.0", "0.0.0", "0.0.1"}
    assert [e.data["text"] for e in tokens if e.data["prompt"] == 0] == ["y", "z"]
    assert all(event.data["choice"] == 0 for event in tokens)
    finishes = [event.data for event in rest if event.event == "finish"]
    assert {(each["prompt"], each["choice"]) for each in finishes} == {(0, 0), (1, 0)}
    assert rest[-1].event == "done"
    assert rest[-1].data["usage"]["prompt_tokens"] == 3
    assert rest[-1].data["usage"]["completion_tokens"] == 3


async def test_choices_share_a_seed_and_differ_by_number(served: Served) -> None:
    body = {"prompt": "ab", "n": 3, "stream": False, "echo": True}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    requests = [await served.fake.expect(AddRequest) for _ in range(3)]
    assert [request.choice for request in requests] == [0, 1, 2]
    assert len({request.seed for request in requests}) == 1
    for request in reversed(requests):
        await served.fake.say(request, b"xyz"[request.choice :], end=FinishReason.LENGTH)
    answer = (await asking).json()
    assert [each["text"] for each in answer["choices"]] == ["abxyz", "abyz", "abz"]
    assert [each["choice"] for each in answer["choices"]] == [0, 1, 2]
    assert answer["choices"][0]["prompt_token_ids"] == [*b"ab"]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 6


async def test_equal_prompts_without_a_seed_draw_one_each(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": ["a", "a"]}):
        first = await served.fake.expect(AddRequest)
        second = await served.fake.expect(AddRequest)
    assert first.seed != second.seed


async def test_one_stream_that_fails_fails_the_answer(served: Served) -> None:
    async with served.http.stream("POST", "/generate", json={"prompt": "a", "n": 2}) as response:
        first = await served.fake.expect(AddRequest)
        await served.fake.expect(AddRequest)
        await served.fake.say(first, b"x", end=FinishReason.LENGTH)
        await served.fake.die()
        events = parse_events((await response.aread()).decode())
    assert [event.event for event in events] == ["token", "finish", "error"]


async def test_request_ids(served: Served) -> None:
    for given in ("abc-1", "x" * 128):
        response = await served.http.get("/health", headers={"X-Request-Id": given})
        assert response.headers["x-request-id"] == given
    for given in ("", "a b", "é", "x" * 129, '"'):
        response = await served.http.get("/health", headers={"X-Request-Id": given.encode()})
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "invalid_request_id"
    missing = await served.http.get("/nowhere")
    assert len(missing.headers["x-request-id"]) == 32


async def test_a_rotation_reaches_the_engine_and_stretches_the_context(served: Served) -> None:
    body = {"prompt": "ab", "stream": False, "rope": {"type": "ntk", "factor": 1.5}}
    asking = asyncio.create_task(served.http.post("/generate", json=body))
    request = await served.fake.expect(AddRequest)
    assert request.params.rope == RopeScaling(type="ntk", factor=1.5)
    assert request.max_tokens == 96 + 1 - 2
    await served.fake.say(request, [*b"hi", EOS], end=FinishReason.STOP)
    assert (await asking).status_code == 200


@pytest.mark.parametrize(
    ("rope", "field", "message"),
    [
        ({"type": "nkt"}, "rope.type", "or 'xpos', got \"nkt\""),
        ({"factor": 2}, "rope.type", "rope.type is required"),
        ({"type": "ntk"}, "rope.factor", "rope.factor is required for type ntk"),
        ({"type": "ntk", "factor": 0.5}, "rope.factor", "must be at least 1, got 0.5"),
        ({"type": "ntk", "factor": "2"}, "rope.factor", 'got "2"'),
        ({"type": "ntk", "factor": 2, "fator": 1}, "rope.fator", "not a field of this request"),
        ({"type": "ntk", "factor": 2, "ramp": "rotations"}, "rope.ramp", "not an option of type"),
        (4, "rope", "got 4"),
    ],
)
async def test_rotations_refused(served: Served, rope: object, field: str, message: str) -> None:
    response = await served.http.post("/generate", json={"prompt": "ab", "rope": rope})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["field"] == field
    assert message in error["message"]
    assert served.fake.quiet
