"""What /generate answers: its events, and its JSON bodies.

What is written for each token is a msgspec.Struct, for speed; all else is a pydantic model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
from pydantic import BaseModel

from engine.frontend.admission import Usage
from engine.frontend.output import TokenDelta
from engine.frontend.stream import Stream, Timing
from engine.frontend.tokenizer import Tokenizer
from engine.messages import TokenLogprobs
from engine.request import FinishReason


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens. Bytes of `token` that are no character show as U+FFFD."""

    token_id: int
    token: str
    logprob: float

    @classmethod
    def all_of(cls, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> list[Self]:
        """The likeliest tokens, with their texts."""
        return [
            cls(token_id=token_id, token=tokenizer.decode([token_id]), logprob=logprob)
            for token_id, logprob in logprobs.top
        ]


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `event: token`. `text` may be empty: half a character, or the start of a stop.

    prompt and choice where the request has several.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[TopLogprob] | None = None
    prompt: int | None = None
    choice: int | None = None


class PromptEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Data of `event: prompt`, where `echo` asks for it."""

    token_ids: list[int]
    text: str
    prompt: int | None = None


class TokenLogprob(BaseModel):
    """A token's log-probability under the model, and the likeliest tokens in its place."""

    token_id: int
    token: str
    logprob: float
    top_logprobs: list[TopLogprob]

    @classmethod
    def of(cls, token_id: int, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> Self:
        """Of the token that was taken."""
        return cls(
            token_id=token_id,
            token=tokenizer.decode([token_id]),
            logprob=logprobs.logprob,
            top_logprobs=TopLogprob.all_of(logprobs, tokenizer),
        )


class UsageBody(BaseModel):
    """Tokens that a request took.

    `cached_tokens` of the prompt were not computed again; `dropped_tokens` were cut from it, and
    are not counted in it, or were shifted out: see `overflow`.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    dropped_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> Self:
        """Of one request."""
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
            cached_tokens=usage.cached_tokens,
            dropped_tokens=usage.dropped_tokens,
        )

    @classmethod
    def total(cls, streams: Sequence[Stream]) -> Self:
        """Of several: each prompt counts once, as its first choice found it."""
        usages = [stream.usage for stream in streams]
        firsts = [stream.usage for stream in streams if stream.choice == 0]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            cached_tokens=sum(usage.cached_tokens for usage in firsts),
            dropped_tokens=sum(usage.dropped_tokens for usage in usages),
        )


class TimingBody(BaseModel):
    """Seconds: in the engine's queue; from there to the first token; from acceptance to the first
    token and to the last; between two tokens on average."""

    queue_s: float | None
    prefill_s: float | None
    first_token_s: float | None
    per_token_s: float | None
    total_s: float | None

    @classmethod
    def of(cls, timing: Timing, num_tokens: int) -> Self:
        """None: it did not come so far, or there were no two tokens."""
        moments = {
            "queue_s": timing.queue,
            "prefill_s": timing.prefill,
            "first_token_s": timing.first_token,
            "per_token_s": timing.per_token(num_tokens),
            "total_s": timing.total,
        }
        return cls.model_validate(
            {name: at if at is None else round(at, 6) for name, at in moments.items()}
        )


class DoneEvent(BaseModel):
    """Data of `event: done`, the last event of a stream that succeeded.

    Where the request has several prompts or choices, each ends with an `event: finish` of this
    form, and `done` has the usage of all.
    """

    finish_reason: FinishReason
    usage: UsageBody
    timing: TimingBody

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """How a stream went that has ended."""
        return cls.model_validate(_summary(stream))


class FinishEvent(DoneEvent):
    """Data of `event: finish`: one choice of several is complete."""

    prompt: int
    choice: int

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """How one choice went."""
        places = {"prompt": stream.prompt, "choice": stream.choice}
        return cls.model_validate(_summary(stream) | places)


class AllDoneEvent(BaseModel):
    """Data of `event: done` where there were several prompts or choices."""

    usage: UsageBody


class ErrorEvent(BaseModel):
    """Data of `event: error`, the last event of a stream that could not finish."""

    code: str
    message: str


class Output(BaseModel):
    """What followed one prompt. With `echo`, `text` begins with the prompt."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason
    usage: UsageBody
    timing: TimingBody


class Choice(Output):
    """One of several outputs: the choice'th for the prompt'th prompt."""

    prompt: int
    choice: int


class GenerateResponse(Output):
    """The body where `"stream": false` and one prompt has one choice."""

    request_id: str


class GenerateManyResponse(BaseModel):
    """The body where `"stream": false` and there are several prompts or choices."""

    request_id: str
    choices: list[Choice]
    usage: UsageBody


def answer(
    request_id: str,
    outputs: Sequence[tuple[Stream, Sequence[TokenDelta]]],
    tokenizer: Tokenizer,
    *,
    echo: bool,
) -> GenerateResponse | GenerateManyResponse:
    """The body for streams that have ended, in their order, with all their tokens."""
    fields = [_output(stream, deltas, tokenizer, echo) for stream, deltas in outputs]
    streams = [stream for stream, _ in outputs]
    if len(streams) == 1:
        return GenerateResponse.model_validate({"request_id": request_id} | fields[0])
    choices = [
        Choice.model_validate({"prompt": stream.prompt, "choice": stream.choice} | each)
        for stream, each in zip(streams, fields, strict=True)
    ]
    return GenerateManyResponse(
        request_id=request_id, choices=choices, usage=UsageBody.total(streams)
    )


def _output(
    stream: Stream, deltas: Sequence[TokenDelta], tokenizer: Tokenizer, echo: bool
) -> dict[str, object]:
    """Fields of an Output; what was not asked for stays unset."""
    fields: dict[str, object] = {"text": "".join(delta.text for delta in deltas)}
    fields["token_ids"] = [delta.token_id for delta in deltas]
    if echo:
        fields["text"] = f"{tokenizer.decode(stream.prompt_token_ids)}{fields['text']}"
        fields["prompt_token_ids"] = stream.prompt_token_ids
    logprobs = [
        TokenLogprob.of(delta.token_id, delta.logprobs, tokenizer)
        for delta in deltas
        if delta.logprobs is not None
    ]
    if logprobs:
        fields["logprobs"] = logprobs
    return fields | _summary(stream)


def _summary(stream: Stream) -> dict[str, object]:
    """Of a stream that has ended."""
    return {
        "finish_reason": stream.finish_reason,
        "usage": UsageBody.of(stream.usage),
        "timing": TimingBody.of(stream.timing, stream.usage.completion_tokens),
    }
