"""The gateway before replicas that the test plays: what dies, what is asked again, what is sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from server.replicas.call import Call, Head
from server.replicas.gateway import PAUSE_SECONDS, Gateway
from server.replicas.splice import Diverged, Splice

STREAM = Head(200, ((b"content-type", b"text/event-stream; charset=utf-8"),))
JSON = Head(200, ((b"content-type", b"application/json"), (b"content-length", b"2")))
BUSY = Head(503, ((b"content-type", b"application/json"),))
DONE = b'event: done\ndata: {"finish_reason":"length"}\n\n'


class Died(Exception):
    """What Ray would raise."""


def token(index: int, text: str = "x") -> bytes:
    return f'id: {index}\nevent: token\ndata: {{"index":{index},"text":"{text}"}}\n\n'.encode()


def failed(code: str) -> bytes:
    return b'event: error\ndata: {"code":"%s","message":""}\n\n' % code.encode()


@dataclass
class Replicas:
    """One script for each call; an exception in it is raised."""

    scripts: list[Iterable[Head | bytes | Exception]]
    calls: list[Call] = field(default_factory=list)
    cancelled: int = 0

    @property
    def respond(self) -> Any:
        return SimpleNamespace(remote=self._remote)

    def _remote(self, call: Call) -> Any:
        self.calls.append(call)
        script = self.scripts[len(self.calls) - 1]

        async def answer() -> AsyncIterator[Head | bytes]:
            for piece in script:
                if isinstance(piece, Exception):
                    raise piece
                yield piece

        iterator = answer()

        def cancel() -> None:
            self.cancelled += 1

        return Answer(iterator, cancel)


class Answer:
    def __init__(self, iterator: Any, cancel: Any) -> None:
        self._iterator, self.cancel = iterator, cancel

    async def __anext__(self) -> Any:
        return await self._iterator.__anext__()


async def ask(replicas: Replicas, attempts: int = 3, **body: object) -> httpx.Response:
    gateway = Gateway(replicas, attempts, (Died,))

    async def endpoint(request: Request) -> Response:
        return await gateway(request)

    app = Starlette(routes=[Route("/{path:path}", endpoint, methods=["GET", "POST"])])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.post("/generate", json={"prompt": "a", **body})


async def test_a_stream_passes_through() -> None:
    replicas = Replicas([[STREAM, token(0), b": waiting\n\n", token(1)[:9], token(1)[9:], DONE]])
    answer = await ask(replicas, seed=5)
    assert answer.content == token(0) + b": waiting\n\n" + token(1) + DONE
    assert json.loads(replicas.calls[0].body) == {"prompt": "a", "seed": 5}
    assert replicas.cancelled == 1


async def test_a_death_is_not_seen() -> None:
    replicas = Replicas(
        [
            [STREAM, token(0), token(1), token(2)[:5], Died()],
            [STREAM, token(0) + token(1), token(2), DONE],
        ]
    )
    answer = await ask(replicas)
    assert answer.content == token(0) + token(1) + token(2) + DONE
    first, second = (json.loads(call.body) for call in replicas.calls)
    assert first["seed"] == second["seed"]  # drawn once, so that the second gives the same


@pytest.mark.parametrize("code", ["engine_dead", "draining", "engine_starting", "engine_start"])
async def test_an_engine_that_dies_is_a_death(code: str) -> None:
    replicas = Replicas([[STREAM, token(0), failed(code)], [STREAM, token(0), token(1), DONE]])
    assert (await ask(replicas)).content == token(0) + token(1) + DONE


async def test_a_fault_of_the_request_is_its_end() -> None:
    replicas = Replicas([[STREAM, token(0), failed("poisoned_request")]])
    assert (await ask(replicas)).content == token(0) + failed("poisoned_request")


async def test_another_answer_is_never_mixed_in() -> None:
    replicas = Replicas([[STREAM, token(0), Died()], [STREAM, token(0, "y"), token(1), DONE]])
    sent = (await ask(replicas)).text
    assert sent.startswith(token(0).decode())
    assert "event: error" in sent
    assert "diverged" in sent
    assert "event: done" not in sent


async def test_after_enough_attempts_the_client_is_told() -> None:
    dead = [STREAM, token(0), Died()]
    sent = (await ask(Replicas([dead, dead]), attempts=2)).text
    assert sent.count("event: token") == 1
    assert "no_replica" in sent
    refused = await ask(Replicas([[BUSY], [Died()]]), attempts=2)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "no_replica"
    assert refused.headers["retry-after"] == "1"


async def test_a_whole_answer() -> None:
    replicas = Replicas([[JSON, b"{", Died()], [BUSY, b"x"], [JSON, b"{", b"}"]])
    answer = await ask(replicas, stream=False)
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert len(replicas.calls) == 3


async def test_what_is_wrong_the_replica_says() -> None:
    refused = Head(422, ((b"content-type", b"application/json"),))
    replicas = Replicas([[refused, b"no"]])
    answer = await ask(replicas, prompt=[1, "a"])
    assert (answer.status_code, answer.content) == (422, b"no")
    assert replicas.calls[0].keys == ()


async def test_waiting_counts_into_the_timeout() -> None:
    replicas = Replicas([[Died()], [STREAM, DONE]])
    await ask(replicas, timeout_s=10)
    first, second = (json.loads(call.body)["timeout_s"] for call in replicas.calls)
    assert 0 < second < first - PAUSE_SECONDS / 2 < 10  # timers may end a little early


async def test_the_length_is_that_of_the_body() -> None:
    replicas = Replicas([[STREAM, DONE]])
    await ask(replicas)
    headers = dict(replicas.calls[0].headers)
    assert int(headers[b"content-length"]) == len(replicas.calls[0].body)


def test_splice_compares() -> None:
    splice = Splice()
    assert list(splice.feed(token(0) + token(1)[:7])) == [token(0)]
    splice.again()
    assert list(splice.feed(token(0) + token(1))) == [token(1)]
    splice.again()
    with pytest.raises(Diverged, match="token 1 differs"):
        list(splice.feed(token(0) + token(1, "z")))
