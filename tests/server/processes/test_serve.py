"""`ropeway serve` and `ropeway generate` as a user runs them, with a real engine process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.patience import PATIENCE
from tests.server.conftest import Event, parse_events

COMMAND = [sys.executable, "-P", "-c", "from server.cli import main; main()"]
OPTIONS = ["--port", "0", "--dtype", "float32", "--threads", "1"]
LONG = {"prompt": "the a", "max_tokens": 180, "ignore_eos": True, "temperature": 0}
ENDLESS = {"prompt": "the a", "overflow": "shift", "ignore_eos": True}


@dataclass
class Server:
    """A running `ropeway serve`."""

    process: subprocess.Popen[str]
    url: str
    shown: str

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(
            base_url=self.url, timeout=PATIENCE, limits=limits, trust_env=False
        ) as client:
            yield client

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it wrote to standard error."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@contextmanager
def serve(directory: Path, *options: str, verify: ssl.SSLContext | bool = True) -> Iterator[Server]:
    process = subprocess.Popen(
        [*COMMAND, "serve", str(directory), *OPTIONS, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        shown = ""
        while "Ctrl-C" not in shown:
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            shown += line
        url = re.search(r"https?://127\.0\.0\.1:\d+", shown)
        assert url is not None
        if "--api-workers" in options:
            until_all_are_ready(url[0], verify)
        yield Server(process, url[0], shown)
    finally:
        process.kill()
        process.communicate()


def until_all_are_ready(url: str, verify: ssl.SSLContext | bool = True) -> None:
    """The first HTTP process announces; the others may still start. Each connection picks one."""
    in_a_row = 0
    deadline = time.monotonic() + PATIENCE
    while in_a_row < 20:
        assert time.monotonic() < deadline
        close = {"Connection": "close"}
        answer = httpx.get(
            f"{url}/ready", headers=close, verify=verify, timeout=PATIENCE, trust_env=False
        )
        in_a_row = in_a_row + 1 if answer.status_code == 200 else 0


@pytest.fixture(scope="module")
def server(tiny_model_dir: Path) -> Iterator[Server]:
    with serve(tiny_model_dir, "--kv-memory", "2MiB", "--max-num-seqs", "40") as running:
        yield running


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> list[Event]:
    async with client.stream("POST", "/generate", json=body) as response:
        assert response.status_code == 200, await response.aread()
        return parse_events((await response.aread()).decode())


async def first_token(parts: AsyncIterator[str]) -> str:
    text = ""
    while "event: token" not in text:
        text += await anext(parts)
    return text


async def gauge(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(rf"^ropeway_{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


async def until_gauge(client: httpx.AsyncClient, name: str, value: float) -> None:
    """It has this value, soon: an HTTP process hears of the engine's numbers after each step."""
    async with asyncio.timeout(PATIENCE):
        while await gauge(client, name) != value:
            await asyncio.sleep(0.01)


async def until_whole(client: httpx.AsyncClient) -> None:
    """Nothing runs and every page is free again, soon."""
    await until_gauge(client, "kv_blocks_used", 0)
    await until_gauge(client, "num_requests_running", 0)


def test_the_panel_says_what_serves(server: Server, tiny_model_dir: Path) -> None:
    for word in (
        server.url,
        tiny_model_dir.name,
        "parameters",
        "cpu, float32",
        "192 tokens",
        "pages of 64 tokens",
        "sequences of",
        f"curl -N {server.url}/generate --json",
    ):
        assert word in server.shown
    assert re.search(r"ready in [\d.]+ s", server.shown)


async def test_32_streams_at_once_say_what_each_says_alone(server: Server) -> None:
    bodies = [
        {"prompt": "the " * (1 + at) + "in", "max_tokens": 128, "ignore_eos": True, "seed": at}
        for at in range(32)
    ]
    async with server.client() as client:
        alone = [
            (await client.post("/generate", json=body | {"stream": False})).json()
            for body in bodies
        ]
        together = await asyncio.gather(*(stream(client, body) for body in bodies))
        await until_whole(client)
    for *tokens, done in together:
        assert [event.id for event in tokens] == [str(index) for index in range(128)]
        assert done.event == "done"
    for expected, (*tokens, _) in zip(alone, together, strict=True):
        assert [event.data["token_id"] for event in tokens] == expected["token_ids"]
        assert "".join(event.data["text"] for event in tokens) == expected["text"]


async def test_a_score_is_what_was_said_when_it_was_generated(server: Server) -> None:
    """Generated tokens, the score of the same text, and the echo of OpenAI's completions."""
    async with server.client() as client:
        body = {"prompt": "the a", "max_tokens": 20, "logprobs": 0, "stream": False, "echo": True}
        said = (await client.post("/generate", json=body | {"ignore_eos": True, "seed": 3})).json()
        text = said["prompt_token_ids"] + said["token_ids"]
        first = len(said["prompt_token_ids"])
        score = (await client.post("/v1/score", json={"text": text, "first": first})).json()
        models = (await client.get("/v1/models")).json()
        body = {"model": models["data"][0]["id"], "prompt": text, "echo": True, "max_tokens": 0}
        echo = (await client.post("/v1/completions", json=body | {"logprobs": 0})).json()
    assert said["text"].startswith("the a")
    expected = [token["logprob"] for token in said["logprobs"]]
    assert [token["logprob"] for token in score["scores"][0]["logprobs"]] == expected
    assert echo["choices"][0]["logprobs"]["token_logprobs"][first:] == expected


async def test_choices_differ_and_bias_decides(server: Server) -> None:
    async with server.client() as client:
        body = {"prompt": "the a", "max_tokens": 8, "n": 3, "seed": 1, "stream": False}
        first = (await client.post("/generate", json=body)).json()["choices"]
        again = (await client.post("/generate", json=body)).json()["choices"]
        alone = (await client.post("/generate", json=body | {"n": 1})).json()
        body = {"prompt": "the a", "max_tokens": 4, "logit_bias": {"65": 100}, "stream": False}
        biased = (await client.post("/generate", json=body | {"temperature": 0})).json()
    tokens = [choice["token_ids"] for choice in first]
    assert len({tuple(each) for each in tokens}) == 3
    assert [choice["token_ids"] for choice in again] == tokens
    assert alone["token_ids"] == tokens[0]
    assert biased["text"] == "AAAA"


async def test_a_client_that_goes_frees_its_pages(server: Server) -> None:
    async with server.client() as client:
        async with client.stream("POST", "/generate", json=ENDLESS) as response:
            await first_token(response.aiter_text())
            assert await gauge(client, "kv_blocks_used") > 0
        await until_whole(client)


async def test_errors_of_the_engine_reach_the_client(server: Server) -> None:
    async with server.client() as client:
        answer = await client.post("/generate", json={"prompt": "a", "max_tokens": 1000})
    assert answer.status_code == 422
    assert answer.json()["error"]["code"] == "context_overflow"
    assert "192" in answer.json()["error"]["message"]


async def test_ctrl_c_drains_every_http_worker(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir, "--api-workers", "2") as server:
        children = server.children()
        assert len(children) == 2
        begun = 0

        async def follow(client: httpx.AsyncClient) -> list[Event]:
            nonlocal begun
            async with client.stream("POST", "/generate", json=LONG) as response:
                parts = response.aiter_text()
                text = await first_token(parts)
                begun += 1
                if begun == 8:
                    server.process.send_signal(signal.SIGINT)
                return parse_events(text + "".join([part async for part in parts]))

        async with server.client() as client:
            await client.get("/health")  # leaves an idle connection, which must not delay
            streams = await asyncio.gather(*(follow(client) for _ in range(8)))
        for *tokens, done in streams:
            assert len(tokens) == LONG["max_tokens"]
            assert [event.data for event in tokens] == [event.data for event in streams[0][:-1]]
            assert done.event == "done"
        assert server.end() == (0, "")
        assert not any(child.is_running() for child in children)


async def test_what_drains_for_too_long_ends_by_an_error(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir, "--drain-timeout", "0") as server:
        async with (
            server.client() as client,
            client.stream("POST", "/generate", json=ENDLESS) as response,
        ):
            parts = response.aiter_text()
            text = await first_token(parts)
            server.process.send_signal(signal.SIGTERM)
            text += "".join([part async for part in parts])
        *_, error = parse_events(text)
        assert (error.event, error.data["code"]) == ("error", "draining")
        assert server.end() == (0, "")


async def test_a_dead_engine_ends_streams_by_an_error_and_the_server(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir, "--max-restarts", "0") as server:
        (engine,) = server.children()
        async with (
            server.client() as client,
            client.stream("POST", "/generate", json=ENDLESS) as response,
        ):
            parts = response.aiter_text()
            text = await first_token(parts)
            engine.kill()
            text += "".join([part async for part in parts])
        *_, error = parse_events(text)
        assert (error.event, error.data["code"]) == ("error", "engine_dead")
        assert server.end() == (1, "error: the engine process ended with status -9\n")


async def test_a_second_ctrl_c_ends_at_once(tiny_model_dir: Path) -> None:
    with serve(tiny_model_dir, "--drain-timeout", "9999") as server:
        (engine,) = server.children()
        engine.suspend()  # so that its stream never ends
        async with server.client() as client, client.stream("POST", "/generate", json=LONG):
            server.process.send_signal(signal.SIGINT)
            async with asyncio.timeout(PATIENCE):
                while (answer := await client.get("/ready")).status_code != 503:
                    await asyncio.sleep(0.01)
            assert answer.json()["error"]["code"] == "draining"
            server.process.send_signal(signal.SIGINT)
            status, _ = await asyncio.to_thread(server.end)
        assert status == 130
        assert not engine.is_running()


def test_a_broken_model_is_one_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    for file in tiny_model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    command = [*COMMAND, "serve", str(tmp_path), "--port", "0"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_generate_in_the_terminal(tiny_model_dir: Path) -> None:
    command = [*COMMAND, "generate", "the a", "--model", str(tiny_model_dir), "--temperature", "0"]
    command += ["--max-tokens", "8", "--ignore-eos", "--dtype", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert len(result.stdout) > 1
    assert re.fullmatch(r"8 tokens: first after [\d.]+ s, then [\d.]+ tokens/s\n", result.stderr)


def test_generate_names_the_limit(tiny_model_dir: Path) -> None:
    options = ["--model", str(tiny_model_dir), "--max-tokens", "999"]
    result = CliRunner().invoke(app, ["generate", "the a", *options])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: prompt (")
    assert "192" in result.stderr


async def test_structured_output_through_openais_fields(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with server.client() as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
        answer = (
            await client.post("/v1/chat/completions", json=chat | {"response_format": form})
        ).json()
        assert json.loads(answer["choices"][0]["message"]["content"])["a"] in (1, 2)
        assert answer["choices"][0]["finish_reason"] == "stop"
        body = {"prompt": "the a", "choice": ["yes", "no"]}
        *tokens, done = await stream(client, body)
        assert "".join(event.data["text"] for event in tokens) in ("yes", "no")
        assert done.data["finish_reason"] == "stop"
