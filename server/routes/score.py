"""POST /v1/score: how likely a given text is."""

from __future__ import annotations

import math
from typing import Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, Field

from engine.errors import InvalidRequest
from engine.frontend.stream import Stream
from engine.frontend.tokenizer import Tokenizer
from engine.params import MAX_INT, MAX_LOGPROBS, within
from server.answers import TokenLogprob, UsageBody
from server.collect import CLIENT_CLOSED_REQUEST, collect, json_response
from server.content import require_json
from server.errors import OPENAI_DOCUMENTED
from server.routes.openai import served_model
from server.schemas import OptionFields, Prompts, RopeBody, bounds, prompts_of
from server.service import CallerDep, ServiceDep

router = APIRouter(prefix="/v1", tags=["score"])


class ScoreRequest(OptionFields):
    """Texts to score."""

    model: str | None = Field(None, description="As /v1/models names it; null: what is served.")
    text: Prompts = Field(
        description="The text, or its token ids; or a list of such texts. At least two tokens each."
    )
    first: int = Field(
        1,
        description="The first token that is scored; those before it are given.",
        json_schema_extra=bounds(1, MAX_INT),
    )
    top_logprobs: int = Field(
        0,
        description="Give that many of the likeliest tokens in each place.",
        json_schema_extra=bounds(0, MAX_LOGPROBS),
    )
    overflow: Literal["error", "shift"] = Field(
        "error", description="Past the context: refuse, or `shift`, which is an approximation."
    )
    rope: RopeBody | None = Field(
        None, description="Another rotation than the model's own, as in /generate."
    )

    def check(self) -> None:
        """Ranges. Raises InvalidRequest."""
        within("first", self.first, 1, MAX_INT)
        within("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)


class TextScore(BaseModel):
    """One text. logprobs: of the tokens from `first` on; logprob: their sum; perplexity: the
    exponential of their negative mean."""

    logprob: float
    perplexity: float
    num_scored: int
    logprobs: list[TokenLogprob]

    @classmethod
    def of(cls, stream: Stream, token_ids: list[int], tokenizer: Tokenizer) -> TextScore:
        """token_ids: those that were scored."""
        assert stream.scores is not None
        total = math.fsum(score.logprob for score in stream.scores)
        return cls(
            logprob=total,
            perplexity=math.exp(-total / len(stream.scores)),
            num_scored=len(stream.scores),
            logprobs=[
                TokenLogprob.of(token_id, score, tokenizer)
                for token_id, score in zip(token_ids, stream.scores, strict=True)
            ],
        )


class ScoreResponse(BaseModel):
    """The texts in their order. usage: of all; nothing was generated."""

    request_id: str
    model: str
    scores: list[TextScore]
    usage: UsageBody


@router.post(
    "/score",
    responses=OPENAI_DOCUMENTED,
    response_model=ScoreResponse,
    dependencies=[Depends(require_json)],
)
async def score(
    body: ScoreRequest, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    """The log-probability of every token of a text, and its perplexity."""
    ready = served_model(service, body.model)
    body.check()
    generation = service.score(
        prompts_of(body.text),
        body.to_options(),
        caller=caller,
        first=body.first,
        top=body.top_logprobs,
        rope=None if body.rope is None else body.rope.scaling(),
    )
    outputs = await collect(generation, request)
    if outputs is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    streams = [stream for stream, _ in outputs]
    if any(stream.scores is None for stream in streams):
        raise InvalidRequest(
            f"timeout_s of {body.timeout_s} passed before everything was scored", "timeout_s"
        )
    tokenizer = service.engine.tokenizer
    scores = [TextScore.of(stream, stream.target_token_ids, tokenizer) for stream in streams]
    usage = UsageBody.total(streams)
    # The last token of a text is looked for and not computed; what is generated means nothing.
    usage.prompt_tokens += len(streams)
    usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
    return json_response(
        ScoreResponse(request_id=caller.request_id, model=ready.model, scores=scores, usage=usage)
    )
