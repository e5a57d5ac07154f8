"""/v1 through OpenAI's own clients, and what goes over the wire."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from engine.messages import AbortRequest, AddRequest, EngineOutput, Hello, TokenLogprobs
from engine.request import FinishReason
from engine.scaling import RopeScaling
from tests.patience import PATIENCE
from tests.server.conftest import Served
from tests.server.fake_engine import READY

TEXT = b"hello"


@asynccontextmanager
async def playing(served: Served, *, logprobs: bool = False) -> AsyncIterator[list[AddRequest]]:
    """The engine says TEXT from the choice's number on, to everything; yields what was asked."""
    asked: list[AddRequest] = []

    async def play() -> None:
        while True:
            request = await served.fake.expect(AddRequest)
            asked.append(request)
            scores = None
            if request.targets is not None:
                scores = [TokenLogprobs(-float(each), []) for each in request.targets.token_ids]
            text = TEXT[request.choice :][: request.max_tokens]
            for index, token_id in enumerate(text):
                end = FinishReason.LENGTH if index == len(text) - 1 else None
                known = TokenLogprobs(-0.5, [(token_id, -0.5), (0xC3, -1.5)]) if logprobs else None
                await served.fake.step(
                    EngineOutput(request.request_id, index, token_id, end, known, 0.0, 0, scores)
                )

    playing = asyncio.create_task(play())
    try:
        yield asked
    finally:
        playing.cancel()
        await asyncio.gather(playing, return_exceptions=True)


def sync_client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0, timeout=PATIENCE
    )


@asynccontextmanager
async def client_of(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


async def test_models(served: Served) -> None:
    async with client_of(served) as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.object, model.owned_by) == ("fake", "model", "ropeway")
        assert (await client.models.retrieve("fake")) == model
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            await client.models.retrieve("other")


async def test_a_models_length_is_that_of_its_own_rotation(starting: Served) -> None:
    stretched = msgspec.structs.replace(READY, rope=RopeScaling(type="ntk", factor=4.0))
    await starting.fake.expect(Hello)
    await starting.fake.welcome(stretched)
    async with client_of(starting) as client, asyncio.timeout(PATIENCE):
        while (await starting.http.get("/ready")).status_code != 200:
            await asyncio.sleep(0.01)
        (model,) = (await client.models.list()).data
    assert model.model_extra == {"max_model_len": 4 * READY.max_position}


async def test_a_completion(served: Served) -> None:
    async with playing(served) as asked, client_of(served) as client:
        completion = await client.completions.create(
            model="fake", prompt=["ab", "c"], n=2 - 1, max_tokens=3, temperature=0, echo=True
        )
    assert [choice.text for choice in completion.choices] == ["abhel", "chel"]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert {choice.finish_reason for choice in completion.choices} == {"length"}
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == 3
    assert completion.usage.completion_tokens == 6
    assert completion.id.startswith("cmpl-")
    assert [request.prompt_token_ids for request in asked] == [[*b"ab"], [*b"c"]]
    assert {request.params.max_tokens for request in asked} == {3}


async def test_defaults_are_openais(served: Served) -> None:
    async with playing(served) as asked, client_of(served) as client:
        await client.completions.create(model="fake", prompt="a")
        await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "a"}]
        )
    assert [request.params.max_tokens for request in asked] == [16, None]
    assert {request.params.temperature for request in asked} == {1.0}


@pytest.mark.parametrize("prompt", ["ab", [97, 98], [[97, 98]], ["ab"]])
async def test_prompts_of_every_kind(served: Served, prompt: Any) -> None:
    async with playing(served) as asked, client_of(served) as client:
        await client.completions.create(model="fake", prompt=prompt)
    assert asked[0].prompt_token_ids == [*b"ab"]


async def test_a_stream_of_completions(served: Served) -> None:
    async with playing(served), client_of(served) as client:
        stream = await client.completions.create(
            model="fake",
            prompt="ab",
            n=2,
            stream=True,
            echo=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "abhello", 1: "abello"}
    *_, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 9)
    ends = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
    assert ends == ["length", "length"]
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_of_completions(served: Served, stream: bool) -> None:
    async with playing(served, logprobs=True) as asked, client_of(served) as client:
        answer = await client.completions.create(
            model="fake", prompt="ab", logprobs=2, stream=stream
        )
        chunks = [chunk async for chunk in answer] if stream else [answer]
    assert asked[0].params.logprobs == 2
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for each in found for token in each.tokens] == [*"hello"]
    assert [at for each in found for at in each.text_offset] == [0, 1, 2, 3, 4]
    assert found[0].token_logprobs[0] == -0.5
    assert found[0].top_logprobs[0] == {"h": -0.5, "bytes:\\xc3": -1.5}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("max_tokens", [0, 2])
async def test_echo_with_logprobs_scores_the_prompt(
    served: Served, stream: bool, max_tokens: int
) -> None:
    """As evaluation harnesses ask for it."""
    async with playing(served, logprobs=True) as asked, client_of(served) as client:
        answer: Any = await client.completions.create(
            model="fake",
            prompt="abc",
            echo=True,
            logprobs=0,
            max_tokens=max_tokens,
            stream=stream,
            **({"stream_options": {"include_usage": True}} if stream else {}),
        )
        chunks = [chunk async for chunk in answer] if stream else [answer]
    assert asked[0].targets is not None
    assert asked[0].targets.token_ids == [*b"bc"]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    logprobs = [choice.logprobs for choice in choices if choice.logprobs]
    values = [value for each in logprobs for value in each.token_logprobs]
    assert values == [None, -98.0, -99.0, -0.5, -0.5][: 3 + max_tokens]
    assert [t for each in logprobs for t in each.tokens] == [*"abche"][: 3 + max_tokens]
    assert [at for each in logprobs for at in each.text_offset] == [*range(3 + max_tokens)]
    assert "".join(choice.text for choice in choices) == "abche"[: 3 + max_tokens]
    assert chunks[-1].usage.completion_tokens == max_tokens


async def test_scores(served: Served) -> None:
    async with playing(served):
        body = {"text": ["abc", [1, 2, 3, 4]], "top_logprobs": 1}
        answer = (await served.http.post("/v1/score", json=body)).json()
    first, second = answer["scores"]
    assert [token["token_id"] for token in first["logprobs"]] == [*b"bc"]
    assert [token["logprob"] for token in first["logprobs"]] == [-98.0, -99.0]
    assert (first["logprob"], first["num_scored"]) == (-197.0, 2)
    assert second["perplexity"] == pytest.approx(math.exp(3))
    assert answer["usage"]["prompt_tokens"] == 7
    assert answer["usage"]["completion_tokens"] == 0


async def test_a_score_under_another_rotation(served: Served) -> None:
    async with playing(served) as asked:
        body = {"text": "a" * 66, "rope": {"type": "ntk", "factor": 4}}  # past the model's context
        response = await served.http.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["scores"][0]["num_scored"] == 65
    assert asked[0].params.rope == RopeScaling(type="ntk", factor=4)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"text": "abc", "rope": {"type": "ntk", "factor": 0.5}}, "rope.factor", "at least 1"),
        ({}, "text", "required"),
        ({"text": "a"}, "text", "must have more tokens than the 1"),
        ({"text": ["ab", "a"]}, "text", "text[1] must have more"),
        ({"text": "abc", "first": 0}, "first", "at least 1"),
        ({"text": "abc", "first": 3}, "text", "more tokens than the 3"),
        ({"text": "abc", "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"text": "abc", "overflow": "truncate"}, "overflow", "error"),
        ({"text": "a" * 66}, "text", "66"),
        ({"text": "abc", "temperature": 1}, "temperature", "not a field"),
    ],
)
async def test_what_cannot_be_scored(
    large: Served, body: dict[str, Any], param: str, words: str
) -> None:
    response = await large.http.post("/v1/score", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


async def test_a_score_that_timed_out_is_an_error(served: Served) -> None:
    body = {"text": "abc", "timeout_s": 0.5}
    asking = asyncio.create_task(served.http.post("/v1/score", json=body))
    request = await served.fake.expect(AddRequest)
    await served.fake.step(EngineOutput(request.request_id, 0, None, FinishReason.TIMEOUT))
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "timeout_s")


async def test_a_chat(served: Served) -> None:
    async with playing(served) as asked, client_of(served) as client:
        answer = await client.chat.completions.create(
            model="fake",
            messages=[
                {"role": "developer", "content": "Be kind."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            ],
            n=2,
            seed=5,
        )
    plain = b"System: Be kind.\n\nUser: Hi\n\nAssistant:"
    assert asked[0].prompt_token_ids == [*plain]
    assert asked[0].params.stop == ("\n\nUser:",)
    assert [request.seed for request in asked] == [5, 5]
    assert [choice.message.content for choice in answer.choices] == ["hello", "ello"]
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(plain)
    assert answer.usage.prompt_tokens_details is not None


@pytest.mark.parametrize("stream", [True, False])
async def test_logprobs_of_a_chat(served: Served, stream: bool) -> None:
    async with playing(served, logprobs=True), client_of(served) as client:
        answer: Any = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "Hi"}],
            logprobs=True,
            top_logprobs=2,
            stream=stream,
        )
        chunks = [chunk async for chunk in answer] if stream else [answer]
    content = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert "".join(token.token for token in content) == "hello"
    assert content[0].bytes == [ord("h")]
    assert [(top.token, top.bytes) for top in content[0].top_logprobs] == [
        ("h", [ord("h")]),
        ("bytes:\\xc3", [0xC3]),
    ]


async def test_the_synchronous_client_streams(served: Served) -> None:
    def chat() -> tuple[str, str | None]:
        with sync_client(served) as client:
            text, end = "", None
            for chunk in client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": "Hi"}], stream=True
            ):
                text += chunk.choices[0].delta.content or ""
                end = chunk.choices[0].finish_reason or end
            return text, end

    async with playing(served):
        assert await asyncio.to_thread(chat) == ("hello", "length")


async def test_leaving_a_stream_aborts(served: Served) -> None:
    async with client_of(served) as client:
        asking = asyncio.create_task(
            client.completions.create(model="fake", prompt="a", stream=True)
        )
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"x")
        stream = await asking
        await anext(stream)
        await stream.close()
        assert await served.fake.expect(AbortRequest) == AbortRequest(request.request_id)


async def test_a_stream_that_fails_has_no_done(served: Served) -> None:
    body = {"model": "fake", "prompt": "a", "stream": True}
    async with served.http.stream("POST", "/v1/completions", json=body) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"x")
        await served.fake.die()
        text = (await response.aread()).decode()
    assert "[DONE]" not in text
    *_, last = [line for line in text.split("\n") if line]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("engine_dead", "server_error")


async def test_their_client_raises_for_a_stream_that_fails(served: Served) -> None:
    async with client_of(served) as client:
        asking = asyncio.create_task(
            client.completions.create(model="fake", prompt="a", stream=True)
        )
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"x")
        stream = await asking
        await anext(stream)
        await served.fake.die()
        with pytest.raises(openai.APIError, match="engine process died"):
            await anext(stream)


MESSAGES = [{"role": "user", "content": "a"}]
WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
    ("completions", {"prompt": "a", "best_of": 3}, "best_of", "got 3"),
    ("completions", {"prompt": "a", "max_tokens": 0}, "max_tokens", "without echo"),
    ("completions", {"prompt": "a", "stream_options": {}}, "stream_options", "stream"),
    ("completions", {"prompt": "a", "nonsense": 1}, "nonsense", "not a field"),
    ("completions", {"prompt": "a", "temperature": 101}, "temperature", "101"),
    ("completions", {}, "prompt", "required"),
    ("chat/completions", {"messages": []}, "messages", "at least one"),
    ("chat/completions", {"messages": MESSAGES * 1025}, "messages", "1025"),
    ("chat/completions", {"messages": MESSAGES, "tools": []}, "tools", "not supported"),
    ("chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs", "logprobs"),
    (
        "chat/completions",
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21},
        "top_logprobs",
        "21",
    ),
    (
        "chat/completions",
        {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 1},
        "max_completion_tokens",
        "max_tokens",
    ),
    (
        "chat/completions",
        {"messages": MESSAGES, "max_completion_tokens": 0},
        "max_completion_tokens",
        "at least 1",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages[0].role",
        "tool",
    ),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
        "type text",
    ),
    ("chat/completions", {"messages": [MESSAGES[0] | {"content": "x" * 60}]}, "messages", "64"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), WRONG)
async def test_what_is_refused(
    large: Served, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    response = await large.http.post(f"/v1/{path}", json={"model": "fake"} | body)
    assert response.status_code == 400, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["code"] in ("invalid_request", "context_overflow")
    assert words in error["message"]


async def test_nulls_are_defaults(served: Served) -> None:
    body = {"model": "fake", "prompt": "a", "temperature": None, "suffix": None, "stop": None}
    async with playing(served):
        assert (await served.http.post("/v1/completions", json=body)).status_code == 200


async def test_other_errors_have_the_shape_too(served: Served) -> None:
    other = await served.http.post("/v1/completions", json={"model": "x", "prompt": "a"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
    form = await served.http.post("/v1/completions", data={"model": "x"})
    assert (form.status_code, form.json()["error"]["param"]) == (415, None)
    served.service.drain()
    late = await served.http.post("/v1/completions", json={"model": "fake", "prompt": "a"})
    assert (late.status_code, late.json()["error"]["type"]) == (503, "server_error")


JAVASCRIPT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "x", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const whole = await client.chat.completions.create({ model: "fake", messages });
let streamed = "";
const chat = await client.chat.completions.create({ model: "fake", messages, stream: true });
for await (const chunk of chat) streamed += chunk.choices[0].delta.content ?? "";
let texts = "";
const stream = await client.completions.create({ model: "fake", prompt: "ab", stream: true });
for await (const chunk of stream) texts += chunk.choices[0].text;
let refused = null;
try { await client.completions.create({ model: "fake", prompt: "a", suffix: "b" }); }
catch (error) { refused = [error.status, error.param]; }
console.log(JSON.stringify([whole.choices[0].message.content, streamed, texts, refused]));
"""


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where JavaScript can import OpenAI's client."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path_factory.mktemp("node")
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "openai"]
    try:
        result = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        pytest.skip("npm install openai takes too long here")
    if result.returncode != 0:
        pytest.skip(f"npm cannot install openai here: {result.stderr[-200:]}")
    return folder


async def test_the_javascript_client(served: Served, node_folder: Path) -> None:
    script = node_folder / "test.mjs"
    script.write_text(JAVASCRIPT)
    async with playing(served):
        node = await asyncio.create_subprocess_exec(
            "node",
            str(script),
            f"http://127.0.0.1:{served.port}/v1",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output, errors = await asyncio.wait_for(node.communicate(), PATIENCE)
    assert node.returncode == 0, errors.decode()
    assert json.loads(output) == ["hello", "hello", "hello", [400, "suffix"]]
