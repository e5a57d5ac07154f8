"""What goes in and comes out as JSON.

Types are strict: "5" is no integer and true is no number. Ranges are not checked here but by
SamplingParams, the one authority; the bounds below only tell /docs, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from engine.frontend.client import Stream
from engine.frontend.output import TokenDelta
from engine.frontend.tokenizer import Tokenizer
from engine.messages import TokenLogprobs
from engine.request import (
    MAX_INT,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_STRINGS,
    MAX_TIMEOUT_S,
    SEED_BITS,
    FinishReason,
    Overflow,
    RequestOptions,
    SamplingParams,
)
from engine.scaling import ScalingType, YarnRamp

DEFAULTS = SamplingParams()
OPTIONS = RequestOptions()


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _text_or_ids(value: object) -> object:
    """One message for the whole union, where pydantic would give one for each member."""
    if isinstance(value, str) or _is_list_of(int, value):
        return value
    raise PydanticCustomError("prompt", "must be a text or a list of token ids")


def _text_or_texts(value: object) -> object:
    if value is None or isinstance(value, str) or _is_list_of(str, value):
        return value
    raise PydanticCustomError("stop", "must be a text or a list of texts")


def _bounds(low: float, high: float, open_low: bool = False) -> dict[str, Any]:
    return {"exclusiveMinimum" if open_low else "minimum": low, "maximum": high}


class RequestModel(BaseModel):
    """A body: what is not known is refused, never ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


class RopeBody(RequestModel):
    """A rotation profile; docs/rope.md of the sources has the formulas."""

    type: ScalingType = Field(description="The formula. `default`: the model's frequencies.")
    factor: float = Field(1.0, description="How many times the context grows, at least 1.")
    original_context: int | None = Field(
        None, description="The context before scaling, in tokens; null: the trained one."
    )
    beta_slow: float = Field(1.0, description="yarn: turns below which a pair is interpolated.")
    beta_fast: float = Field(32.0, description="yarn: turns above which a pair is kept.")
    truncate: bool = Field(True, description="yarn: round the ramp's bounds outwards.")
    ramp: YarnRamp = Field("dimension", description="yarn: linear in what, between the bounds.")
    attention_factor: float | None = Field(
        None, description="yarn: multiplies queries and keys; null: 0.1 ln(factor) + 1."
    )
    low_freq_factor: float = Field(1.0, description="llama3: as beta_slow.")
    high_freq_factor: float = Field(4.0, description="llama3: as beta_fast.")
    scale_base: float = Field(512.0, description="xpos: tokens over which scores fall by zeta.")


class GenerateRequest(RequestModel):
    """A prompt, and how to choose the tokens that follow it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The old captain", "max_tokens": 64}]}
    )

    prompt: Annotated[str | list[int], BeforeValidator(_text_or_ids)] = Field(
        description="The text to continue, or its token ids. At least one token."
    )
    stream: bool = Field(True, description="Server-sent events; false: one JSON body at the end.")
    max_tokens: int | None = Field(
        DEFAULTS.max_tokens,
        description="Tokens to generate; null: as many as the context has room for.",
        json_schema_extra=_bounds(1, MAX_INT),
    )
    temperature: float = Field(
        DEFAULTS.temperature,
        description="Logits are divided by it; 0 takes the likeliest token.",
        json_schema_extra=_bounds(0, 100),
    )
    top_k: int = Field(
        DEFAULTS.top_k,
        description="Keep the k likeliest tokens; 0 keeps all.",
        json_schema_extra=_bounds(0, MAX_INT),
    )
    top_p: float = Field(
        DEFAULTS.top_p,
        description="Keep the smallest set of likeliest tokens whose mass reaches p (nucleus).",
        json_schema_extra=_bounds(0, 1, open_low=True),
    )
    min_p: float = Field(
        DEFAULTS.min_p,
        description="Keep tokens at least min_p times as likely as the likeliest.",
        json_schema_extra=_bounds(0, 1),
    )
    repetition_penalty: float = Field(
        DEFAULTS.repetition_penalty,
        description="Makes tokens of prompt and output less likely (CTRL); 1 does nothing.",
        json_schema_extra=_bounds(0.01, 100),
    )
    presence_penalty: float = Field(
        DEFAULTS.presence_penalty,
        description="Subtracted once from the logits of tokens that the output has.",
        json_schema_extra=_bounds(-100, 100),
    )
    frequency_penalty: float = Field(
        DEFAULTS.frequency_penalty,
        description="Subtracted from a token's logit for each time that the output has it.",
        json_schema_extra=_bounds(-100, 100),
    )
    seed: int | None = Field(
        DEFAULTS.seed,
        description="Same prompt, parameters and seed: the same tokens. null: drawn.",
        json_schema_extra=_bounds(0, 2**SEED_BITS - 1),
    )
    stop: Annotated[str | list[str] | None, BeforeValidator(_text_or_texts)] = Field(
        None,
        description=f"Text that ends the output and is not part of it, or up to "
        f"{MAX_STOP_STRINGS} such texts.",
    )
    stop_token_ids: list[int] = Field(
        list(DEFAULTS.stop_token_ids), description="Token ids that end the output."
    )
    ignore_eos: bool = Field(DEFAULTS.ignore_eos, description="Go on after the model's end token.")
    logprobs: int | None = Field(
        DEFAULTS.logprobs,
        description="Give each token's log-probability and those of the k likeliest.",
        json_schema_extra=_bounds(0, MAX_LOGPROBS),
    )
    priority: int = Field(
        OPTIONS.priority,
        description="The greater, the sooner the request starts; the others wait longer, but never "
        "for ever.",
        json_schema_extra=_bounds(-MAX_PRIORITY, MAX_PRIORITY),
    )
    timeout_s: float | None = Field(
        OPTIONS.timeout_s,
        description="Seconds that the request may wait and run; then it ends with what it has and "
        "the finish reason `timeout`. null: no limit.",
        json_schema_extra=_bounds(0, MAX_TIMEOUT_S, open_low=True),
    )
    overflow: Overflow = Field(
        OPTIONS.overflow,
        description="Where prompt and max_tokens do not fit the context: `error` refuses the "
        "request; `truncate` keeps the end of the prompt; `shift` goes on without end by dropping "
        "the oldest pages after the first, which is an approximation.",
    )

    rope: RopeBody | None = Field(
        None,
        description="Stretch this request's context: another rotation than the model's own, such "
        'as `{"type": "ntk", "factor": 4}`. The context follows the factor.',
    )

    def to_params(self) -> SamplingParams:
        """Checked sampling parameters. Raises InvalidRequest."""
        fields = {name: getattr(self, name) for name in SamplingParams.__struct_fields__}
        stop = () if self.stop is None else self.stop
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        fields["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.rope is not None:
            fields["rope"] = self.rope.model_dump(exclude_unset=True)
        return SamplingParams(**fields)

    def to_options(self) -> RequestOptions:
        """Checked options. Raises InvalidRequest."""
        return RequestOptions(
            priority=self.priority, timeout_s=self.timeout_s, overflow=self.overflow
        )


class TopLogprob(BaseModel):
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


class TokenLogprob(TopLogprob):
    """A token's log-probability under the model, and the likeliest tokens in its place."""

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


class TokenEvent(BaseModel):
    """Data of `event: token`. `text` may be empty: half a character, or the start of a stop."""

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[TopLogprob] | None = None

    @classmethod
    def of(cls, delta: TokenDelta, tokenizer: Tokenizer) -> Self:
        """Log-probabilities stay unset where they were not asked for."""
        event = cls(index=delta.index, token_id=delta.token_id, text=delta.text)
        if delta.logprobs is not None:
            event.logprob = delta.logprobs.logprob
            event.top_logprobs = TopLogprob.all_of(delta.logprobs, tokenizer)
        return event


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


class TimingBody(BaseModel):
    """Seconds: in the engine's queue; from acceptance to the first token and to the last."""

    queue_s: float | None
    first_token_s: float | None
    total_s: float | None


class DoneEvent(BaseModel):
    """Data of `event: done`, the last event of a stream that succeeded."""

    finish_reason: FinishReason
    usage: UsageBody
    timing: TimingBody

    @classmethod
    def of(cls, stream: Stream) -> Self:
        """How a stream went that has ended."""
        return cls.model_validate(_summary(stream))


class ErrorEvent(BaseModel):
    """Data of `event: error`, the last event of a stream that could not finish."""

    code: str
    message: str


class GenerateResponse(BaseModel):
    """The body where `"stream": false`."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason
    usage: UsageBody
    timing: TimingBody

    @classmethod
    def of(cls, stream: Stream, deltas: Sequence[TokenDelta], tokenizer: Tokenizer) -> Self:
        """A whole output. Log-probabilities stay unset where they were not asked for."""
        response = cls.model_validate(
            {
                "request_id": stream.request_id,
                "text": "".join(delta.text for delta in deltas),
                "token_ids": [delta.token_id for delta in deltas],
                **_summary(stream),
            }
        )
        logprobs = [
            TokenLogprob.of(delta.token_id, delta.logprobs, tokenizer)
            for delta in deltas
            if delta.logprobs is not None
        ]
        if logprobs:
            response.logprobs = logprobs
        return response


def _summary(stream: Stream) -> dict[str, Any]:
    """Of a stream that has ended."""
    usage, timing = stream.usage, stream.timing
    moments = {
        "queue_s": timing.queue,
        "first_token_s": timing.first_token,
        "total_s": timing.total,
    }
    return {
        "finish_reason": stream.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
            "cached_tokens": usage.cached_tokens,
            "dropped_tokens": usage.dropped_tokens,
        },
        "timing": {name: at if at is None else round(at, 6) for name, at in moments.items()},
    }


class ErrorDetail(BaseModel):
    """`code` is stable and for programs; `message` is for people; `field` is the guilty one."""

    code: str
    message: str
    field: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


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
