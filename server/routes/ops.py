"""For those who run the server: probes, metrics, tokenising."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel

from engine.errors import InvalidRequest
from engine.frontend.admission import check_token_ids
from server.content import require_json
from server.errors import DOCUMENTED, ErrorBody
from server.metrics import CONTENT_TYPE
from server.schemas import RequestModel
from server.service import ServiceDep

router = APIRouter(tags=["operations"])


class TokenizeRequest(RequestModel):
    """Text to token ids."""

    text: str


class TokenizeResponse(BaseModel):
    """Token ids, as the model sees the text."""

    token_ids: list[int]


class DetokenizeRequest(RequestModel):
    """Token ids to text."""

    token_ids: list[int]


class DetokenizeResponse(BaseModel):
    """The text; bytes that are not UTF-8 become U+FFFD."""

    text: str


class StatusResponse(BaseModel):
    """A probe that succeeded."""

    status: Literal["ok", "ready"]


@router.get("/health", responses={503: {"model": ErrorBody}})
async def health(service: ServiceDep) -> StatusResponse:
    """Whether the server is alive: 503 once the engine is gone for good."""
    if service.engine.error is not None:
        raise service.engine.error
    return StatusResponse(status="ok")


@router.get("/ready", responses={503: {"model": ErrorBody}})
async def ready(service: ServiceDep) -> StatusResponse:
    """Whether a request would be served now: 503 while the model loads and while draining."""
    service.check_ready()
    return StatusResponse(status="ready")


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceDep) -> Response:
    """Prometheus metrics of this HTTP process and of the engine."""
    return Response(service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE})


@router.post("/tokenize", responses=DOCUMENTED, dependencies=[Depends(require_json)])
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> TokenizeResponse:
    """Text to token ids."""
    # In a thread: a long text takes a while, and tiktoken lets other threads run.
    try:
        token_ids = await asyncio.to_thread(service.engine.tokenizer.encode, body.text)
    except ValueError as error:
        raise InvalidRequest(f"text cannot be tokenised: {error}", "text") from error
    return TokenizeResponse(token_ids=token_ids)


@router.post("/detokenize", responses=DOCUMENTED, dependencies=[Depends(require_json)])
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> DetokenizeResponse:
    """Token ids to text."""
    tokenizer = service.engine.tokenizer
    check_token_ids(body.token_ids, tokenizer, "token_ids", "token_ids")
    return DetokenizeResponse(text=tokenizer.decode(body.token_ids))
