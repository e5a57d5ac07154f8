"""Every error: its status, its code, and a message that names the field and the limit."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from engine.messages import AbortRequest, AddRequest
from tests.server.conftest import SETTINGS, Served, running


def check(response: httpx.Response, status: int, code: str, field: str | None, *words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"code", "message", "field"}
    assert (error["code"], error["field"]) == (code, field), error
    for word in words:
        assert word in error["message"], error["message"]


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """One server for all these tests: an error must leave it as it was."""
    async with running(tmp_path_factory.mktemp("errors"), SETTINGS) as served:
        await served.until_ready()
        yield served


INVALID: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"max_tokens": 1}, "prompt", ["required"]),
    ({"prompt": ""}, "prompt", ["at least one token"]),
    ({"prompt": []}, "prompt", ["at least one token"]),
    ({"prompt": 7}, "prompt", ["a text, a list of token ids", "7"]),
    ({"prompt": ["a", 1]}, "prompt", ["a text, a list of token ids"]),
    ({"prompt": ["a", ""]}, "prompt", ["prompt[1]", "at least one token"]),
    ({"prompt": ["a", [1, 257]]}, "prompt", ["prompt[1][1]", "257", "256"]),
    ({"prompt": ["a", "b"], "n": 2}, "n", ["4 sequences", "limit is 3"]),
    ({"prompt": ["a"] * 4}, "prompt", ["4 sequences", "limit is 3"]),
    ({"prompt": "a", "n": 0}, "n", ["at least 1", "got 0"]),
    ({"prompt": "a", "n": 129}, "n", ["at most 128", "129"]),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", ["token ids as keys"]),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias", ["map token ids"]),
    ({"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias", ["logit_bias[1]", "100", "101"]),
    ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias[1]", ["number", '"x"']),
    ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias", ["257", "0 to 256"]),
    ({"prompt": "a", "cache_salt": "x" * 257}, "cache_salt", ["256", "257"]),
    ({"prompt": [1, True]}, "prompt", ["a text, a list of token ids"]),
    ({"prompt": [1, 257]}, "prompt", ["prompt[1]", "257", "256"]),
    ({"prompt": [-1]}, "prompt", ["prompt[0]", "-1"]),
    ({"prompt": "a", "temprature": 1}, "temprature", ["temprature", "not a field"]),
    ({"prompt": "a", "max_tokens": "5"}, "max_tokens", ["integer", '"5"']),
    ({"prompt": "a", "max_tokens": True}, "max_tokens", ["integer", "true"]),
    ({"prompt": "a", "max_tokens": 1.5}, "max_tokens", ["integer", "1.5"]),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens", ["at least 1", "got 0"]),
    ({"prompt": "a", "temperature": True}, "temperature", ["number", "true"]),
    ({"prompt": "a", "temperature": "hot"}, "temperature", ["number", '"hot"']),
    ({"prompt": "a", "temperature": -0.1}, "temperature", ["at least 0", "-0.1"]),
    ({"prompt": "a", "temperature": None}, "temperature", ["number", "null"]),
    ({"prompt": "a", "temperature": float("nan")}, "temperature", ["nan"]),
    ({"prompt": "a", "temperature": 10**400}, "temperature", ["number"]),
    ({"prompt": "a", "top_k": -1}, "top_k", ["at least 0", "-1"]),
    ({"prompt": "a", "top_k": 10**30}, "top_k", ["at most"]),
    ({"prompt": "a", "top_p": 0}, "top_p", ["greater than 0", "at most 1"]),
    ({"prompt": "a", "min_p": 1.1}, "min_p", ["at most 1", "1.1"]),
    ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty", ["at least 0.01"]),
    ({"prompt": "a", "seed": 2**64}, "seed", ["at most", str(2**64)]),
    ({"prompt": "a", "seed": 10**400}, "seed", ["at most"]),
    ({"prompt": "a", "seed": -1}, "seed", ["at least 0"]),
    ({"prompt": "a", "logprobs": 21}, "logprobs", ["at most 20", "21"]),
    ({"prompt": "a", "stop": 5}, "stop", ["text or a list of texts", "5"]),
    ({"prompt": "a", "stop": [""]}, "stop", ["empty"]),
    ({"prompt": "a", "stop": ["x"] * 17}, "stop", ["16", "17"]),
    ({"prompt": "a", "stop_token_ids": ["x"]}, "stop_token_ids[0]", ["integer", '"x"']),
    ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids", ["at least 0", "-1"]),
    ({"prompt": "a", "stop_token_ids": [10**30]}, "stop_token_ids", ["at most"]),
    ({"prompt": "a", "stream": "yes"}, "stream", ["boolean", '"yes"']),
    ({"prompt": "a", "stream": 1}, "stream", ["boolean", "1"]),
    ({"prompt": "a", "regex": "(a"}, "regex", ["regex", "unclosed"]),
    ({"prompt": "a", "choice": []}, "choice", ["not empty"]),
    ({"prompt": "a", "choice": ["a"], "regex": "b"}, "choice", ["regex and choice", "together"]),
    ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format", ["goes with"]),
    ({"prompt": "a", "response_format": {"type": "xml"}}, "response_format.type", ["xml"]),
    ({"prompt": "a", "regex": "a", "ignore_eos": True}, "ignore_eos", ["regex"]),
    ({"prompt": "a", "ignore_eos": 0}, "ignore_eos", ["boolean"]),
]


@pytest.mark.parametrize(("body", "field", "words"), INVALID, ids=lambda case: str(case)[:40])
async def test_invalid(served: Served, body: dict[str, Any], field: str, words: list[str]) -> None:
    response = await served.http.post(
        "/generate", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    check(response, 422, "invalid_request", field, *words)
    assert served.fake.quiet


async def test_lone_surrogates(served: Served) -> None:
    headers = {"content-type": "application/json"}
    for name in ("prompt", "stop"):
        content = json.dumps({"prompt": "a", name: "x\ud800"})
        response = await served.http.post("/generate", content=content, headers=headers)
        check(response, 422, "invalid_request", name)
    response = await served.http.post(
        "/generate", content='{"prompt": "a", "\\ud800": 1}', headers=headers
    )
    check(response, 422, "invalid_request", None, "not a field")


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"prompt": [1] * 65}, "prompt", ["65", "64"]),
        ({"prompt": "x" * 65}, "prompt", ["65", "64"]),
        ({"prompt": [1] * 60, "max_tokens": 6}, "max_tokens", ["60", "6", "64", "at most 5"]),
    ],
)
async def test_too_long(served: Served, body: dict[str, Any], field: str, words: list[str]) -> None:
    check(await served.http.post("/generate", json=body), 422, "context_overflow", field, *words)


@pytest.mark.parametrize(
    ("content", "status", "code", "words"),
    [
        ("{", 400, "invalid_json", "the body is not valid JSON"),
        ('{"prompt": "a"} x', 400, "invalid_json", "the body is not valid JSON"),
        ("\xff", 400, "bad_request", "parsing the body"),
        ("", 422, "invalid_request", "the body must be a JSON object"),
        ("[1]", 422, "invalid_request", "the body must be a JSON object"),
        ('"text"', 422, "invalid_request", "the body must be a JSON object"),
        ("null", 422, "invalid_request", "the body must be a JSON object"),
    ],
)
async def test_bodies_that_are_no_object(
    served: Served, content: str, status: int, code: str, words: str
) -> None:
    response = await served.http.post(
        "/generate",
        content=content.encode("latin-1"),
        headers={"content-type": "application/json"},
    )
    check(response, status, code, None, words)


async def test_content_type(served: Served) -> None:
    for headers in ({"content-type": "text/plain"}, {}):
        response = await served.http.post("/generate", content=b'{"prompt":"a"}', headers=headers)
        check(response, 415, "unsupported_media_type", None, "application/json")
    form = await served.http.post("/generate", data={"prompt": "a"})
    check(form, 415, "unsupported_media_type", None, "application/x-www-form-urlencoded")


async def test_a_body_too_large(served: Served) -> None:
    large = b'{"prompt": "%b"}' % (b"x" * SETTINGS.max_body_bytes)
    headers = {"content-type": "application/json"}
    declared = await served.http.post("/generate", content=large, headers=headers)
    check(declared, 413, "body_too_large", None, str(SETTINGS.max_body_bytes), str(len(large)))

    async def chunks() -> Any:
        for at in range(0, len(large), 1000):
            yield large[at : at + 1000]

    chunked = await served.http.post("/generate", content=chunks(), headers=headers)
    check(chunked, 413, "body_too_large", None, str(SETTINGS.max_body_bytes))
    assert (await served.http.get("/health")).status_code == 200


async def test_no_such_place(served: Served) -> None:
    check(await served.http.get("/nowhere"), 404, "not_found", None)
    response = await served.http.get("/generate")
    check(response, 405, "method_not_allowed", None)
    assert response.headers["allow"] == "POST"


async def test_a_full_queue(served: Served) -> None:
    """max_num_seqs 2 and max_queue 1: the fourth is one too many."""
    async with AsyncExitStack() as clients:
        for _ in range(3):
            await clients.enter_async_context(served.raw({"prompt": "a"}))
            await served.fake.expect(AddRequest)
        response = await served.http.post("/generate", json={"prompt": "a"})
    check(response, 429, "queue_full", None, "3", "max_queue 1")
    assert response.headers["retry-after"] == "1"
    for _ in range(3):
        await served.fake.expect(AbortRequest)


async def test_a_bug_is_a_500_in_the_same_shape(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(served.service, "generate", broken)
    response = await served.http.post("/generate", json={"prompt": "a"})
    check(response, 500, "internal_error", None)
    assert "secret" not in response.text
    assert len(response.headers["x-request-id"]) == 32
    assert "secret" in caplog.text


async def test_tokenize_and_back(served: Served) -> None:
    text = "é!"
    ids = (await served.http.post("/tokenize", json={"text": text})).json()
    assert ids == {"token_ids": list(text.encode())}
    back = await served.http.post("/detokenize", json=ids)
    assert back.json() == {"text": text}
    half = await served.http.post("/detokenize", json={"token_ids": [0xC3]})
    assert half.json() == {"text": "\ufffd"}
    wrong = await served.http.post("/detokenize", json={"token_ids": [1, 999]})
    check(wrong, 422, "invalid_request", "token_ids", "token_ids[1]", "999", "256")
    check(await served.http.post("/tokenize", json={}), 422, "invalid_request", "text")


async def test_the_documents(served: Served) -> None:
    assert (await served.http.get("/docs")).status_code == 200
    document = (await served.http.get("/openapi.json")).json()
    answers = document["paths"]["/generate"]["post"]["responses"]
    assert {"200", "400", "401", "409", "413", "415", "422", "429", "500", "503"} == set(answers)
    assert set(answers["200"]["content"]) == {"text/event-stream", "application/json"}
    for status in answers.keys() - {"200"}:
        schema = answers[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorBody"}
