"""Requests made from the OpenAPI document: no fault of the server, no undocumented answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode, openapi
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    response_schema_conformance,
    status_code_conformance,
)

from engine.messages import AddRequest, EngineOutput, TokenLogprobs
from engine.request import FinishReason
from tests.patience import PATIENCE
from tests.server.conftest import SETTINGS, running

EXAMPLES = 20
OPERATIONS = {
    "GET /generate/{request_id}",
    "GET /health",
    "GET /metrics",
    "GET /ready",
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /detokenize",
    "POST /generate",
    "POST /tokenize",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/score",
}
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


async def answer_all(directory: Path, port: Queue[int], stop: Event) -> None:
    """A server whose engine answers everything by one token."""
    async with running(directory, replace(SETTINGS, max_queue=1000)) as served:
        await served.until_ready()
        port.put(served.port)
        while not stop.is_set():
            with suppress(TimeoutError):
                message = await served.fake.next(timeout=0.1)
                if isinstance(message, AddRequest):
                    await served.fake.step(one_token(message))


def one_token(request: AddRequest) -> EngineOutput:
    """The whole answer, with everything that was asked for."""
    logprobs = TokenLogprobs(-1.0, []) if request.params.logprobs is not None else None
    scores = None
    if request.targets is not None:
        scores = [TokenLogprobs(-1.0, [])] * len(request.targets.token_ids)
    return EngineOutput(
        request.request_id, 0, ord("x"), FinishReason.LENGTH, logprobs, 0.0, 0, scores
    )


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    port: Queue[int] = Queue()
    stop = Event()
    directory = tmp_path_factory.mktemp("openapi")
    thread = Thread(target=lambda: asyncio.run(answer_all(directory, port, stop)), daemon=True)
    thread.start()
    try:
        yield openapi.from_url(f"http://127.0.0.1:{port.get(timeout=PATIENCE)}/openapi.json")
    finally:
        stop.set()
        thread.join(PATIENCE)


def test_every_operation_is_tried(schema: BaseSchema) -> None:
    assert {found.ok().label for found in schema.get_all_operations()} == OPERATIONS


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_answers_are_the_documented_ones(
    schema: BaseSchema, label: str, mode: GenerationMode
) -> None:
    operation = next(
        found.ok() for found in schema.get_all_operations() if found.ok().label == label
    )
    if mode is GenerationMode.NEGATIVE and not operation.body:
        pytest.skip("it has no body that could be wrong")

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES if operation.method.upper() == "POST" else 3,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def try_one(case: Case) -> None:
        case.validate_response(case.call(timeout=PATIENCE), checks=CHECKS)

    try_one()
