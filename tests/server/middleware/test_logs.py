"""The log: one JSON object a line, never with a prompt unless asked; and traces."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from typer.testing import CliRunner

from engine.messages import AddRequest
from engine.request import FinishReason
from server.cli import app
from server.middleware.logs import FIELDS, JsonFormatter, TextFormatter, access_logger, configure
from server.middleware.tracing import Tracing
from tests.patience import PATIENCE
from tests.server.conftest import SETTINGS, Served, running

SECRET = "a secret prompt"


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the access log would write as JSON."""
    written: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(JsonFormatter().format(record))

    handler = Handler()
    access_logger.addHandler(handler)
    access_logger.setLevel(logging.INFO)
    yield written
    access_logger.removeHandler(handler)
    access_logger.setLevel(logging.NOTSET)


async def ask(served: Served) -> None:
    headers = {"X-Request-Id": "mine"}
    async with served.http.stream(
        "POST", "/generate", json={"prompt": SECRET}, headers=headers
    ) as response:
        request = await served.fake.expect(AddRequest)
        await served.fake.say(request, b"xy", end=FinishReason.LENGTH)
        await response.aread()


async def test_a_request_is_one_line_without_its_prompt(served: Served, lines: list[str]) -> None:
    await ask(served)
    await served.http.get("/metrics")
    async with asyncio.timeout(PATIENCE):
        while not lines:
            await asyncio.sleep(0.01)
    (line,) = lines
    fields = json.loads(line)
    assert SECRET not in line
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/generate", 200)
    assert (fields["level"], fields["message"], fields["request_id"]) == ("info", "request", "mine")
    assert fields["completion_tokens"] == [2]
    assert fields["finish_reason"] == ["length"]
    assert fields["seconds"] > 0
    assert fields["time"].endswith("Z")


async def test_errors_are_named(served: Served, lines: list[str]) -> None:
    await served.http.post("/generate", json={"prompt": SECRET, "top_p": 7})
    async with served.http.stream("POST", "/generate", json={"prompt": SECRET}) as response:
        await served.fake.expect(AddRequest)
        await served.fake.die()
        await response.aread()
    async with asyncio.timeout(PATIENCE):
        while len(lines) < 2:  # a line is written when the connection is let go
            await asyncio.sleep(0.01)
    first, second = map(json.loads, lines)
    assert (first["status"], first["error"]) == (422, "invalid_request")
    assert (second["status"], second["error"]) == (200, "engine_dead")
    assert SECRET not in "".join(lines)


async def test_prompts_are_there_where_asked_for(tmp_path: Path, lines: list[str]) -> None:
    async with running(tmp_path, replace(SETTINGS, log_prompts=True)) as served:
        await served.until_ready()
        lines.clear()
        await ask(served)
    assert json.loads(lines[0])["prompts"] == [SECRET]


def test_text_and_tracebacks() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "said %s", ("so",), None)
    setattr(record, FIELDS, {"status": 200})
    assert TextFormatter().format(record).endswith("INFO    said so status=200")
    try:
        raise RuntimeError("why")
    except RuntimeError:
        record.exc_info = sys.exc_info()
    assert "RuntimeError: why" in json.loads(JsonFormatter().format(record))["exception"]
    assert json.loads(JsonFormatter().format(record))["status"] == 200


def test_configure_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        configure("json", "info")
        access_logger.info("request", extra={FIELDS: {"status": 200}})
        assert json.loads(capsys.readouterr().err)["status"] == 200
        configure("text", "warning")
        access_logger.info("request")
        assert capsys.readouterr().err == ""
    finally:
        root.handlers, root.level = handlers, level
        logging.getLogger("ropeway").setLevel(logging.NOTSET)


async def test_spans_from_the_wire_to_the_last_token(tmp_path: Path) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    tracing = partial(Tracing, provider=provider)
    async with running(tmp_path, SETTINGS, tracing) as served:
        await served.until_ready()
        served.http.headers["traceparent"] = f"00-{trace_id}-b7ad6b7169203331-01"
        await ask(served)
        await served.http.get("/health")
    *children, server = exporter.get_finished_spans()
    assert server.name == "POST /generate"
    assert [span.name for span in children] == ["queue", "prefill", "decode"]
    assert {format(s.context.trace_id, "032x") for s in (*children, server)} == {trace_id}
    for span in children:
        assert span.parent is not None
        assert span.parent.span_id == server.context.span_id
    queue, prefill, decode = children
    assert queue.end_time == prefill.start_time
    assert decode.attributes is not None
    assert decode.attributes["gen_ai.usage.output_tokens"] == 2
    assert server.attributes is not None
    assert server.attributes["http.response.status_code"] == 200
    assert server.attributes["ropeway.request_id"] == "mine"


def test_an_absent_extra_is_named(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.middleware.tracing", None)
    options = ["--port", "0", "--otlp-endpoint", "http://127.0.0.1:9/v1/traces"]
    result = CliRunner().invoke(app, ["serve", str(tiny_model_dir), *options])
    assert result.exit_code == 1
    assert "pip install 'ropeway[otel]'" in result.stderr
