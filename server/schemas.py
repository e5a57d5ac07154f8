"""What goes in as JSON.

Types are strict: "5" is no integer and true is no number. Ranges are not checked here but by
SamplingParams, the one authority; the bounds below only tell /docs, and a test compares the two.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from engine.errors import ConfigError, InvalidRequest
from engine.params import (
    MAX_BIAS,
    MAX_BIASES,
    MAX_GRAMMAR,
    MAX_INT,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_SALT,
    MAX_STOP_STRINGS,
    MAX_TIMEOUT_S,
    SEED_BITS,
    Grammar,
    Overflow,
    RequestOptions,
    SamplingParams,
    no_such_rotation,
    within,
)
from engine.scaling import RopeScaling, ScalingType, YarnRamp

MAX_CHOICES = 128
DEFAULTS = SamplingParams()
OPTIONS = RequestOptions()


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or _is_list_of(int, value)


def _prompts(value: object) -> object:
    """One message for the whole union, where pydantic would give one for each member."""
    if _is_prompt(value) or (isinstance(value, list) and all(map(_is_prompt, value))):
        return value
    raise PydanticCustomError("prompt", "must be a text, a list of token ids, or a list of these")


def _biases(value: object) -> object:
    """JSON has no integer keys."""
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must map token ids to numbers")
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 11):
            raise PydanticCustomError("logit_bias", "must have token ids as keys")
    return {int(key): bias for key, bias in value.items()}


def _text_or_texts(value: object) -> object:
    if value is None or isinstance(value, str) or _is_list_of(str, value):
        return value
    raise PydanticCustomError("stop", "must be a text or a list of texts")


def bounds(low: float, high: float, open_low: bool = False) -> dict[str, Any]:
    """A range for /docs. open_low: `low` itself is outside."""
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

    def scaling(self) -> RopeScaling:
        """The rotation that was asked for. Raises InvalidRequest."""
        try:
            return RopeScaling.from_dict(self.model_dump(exclude_unset=True))
        except ConfigError as error:
            raise no_such_rotation(error) from error


class JsonSchema(RequestModel):
    """As OpenAI's clients send it. Every schema is obeyed strictly."""

    name: str = "schema"
    description: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """`text`: anything; `json_object`: any JSON object; `json_schema`: what `json_schema` says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """None for `text`. Raises InvalidRequest."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidRequest(
                f"response_format.json_schema goes with type json_schema, and with no other; type "
                f"is {self.type}",
                "response_format",
            )
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema.json_schema))
        return Grammar("json_schema", '{"type": "object"}') if self.type == "json_object" else None


Prompts = Annotated[str | list[int] | list[str | list[int]], BeforeValidator(_prompts)]
"""A text, its token ids, or several of these."""


class OptionFields(RequestModel):
    """How a request is treated: of every route that computes."""

    priority: int = Field(
        OPTIONS.priority,
        description="The greater, the sooner the request starts; the others wait longer, but never "
        "for ever.",
        json_schema_extra=bounds(-MAX_PRIORITY, MAX_PRIORITY),
    )
    timeout_s: float | None = Field(
        OPTIONS.timeout_s,
        description="Seconds that the request may wait and run; then it ends with what it has and "
        "the finish reason `timeout`. null: no limit.",
        json_schema_extra=bounds(0, MAX_TIMEOUT_S, open_low=True),
    )
    overflow: Overflow = Field(
        OPTIONS.overflow,
        description="Where prompt and max_tokens do not fit the context: `error` refuses the "
        "request; `truncate` keeps the end of the prompt; `shift` goes on without end by dropping "
        "the oldest pages after the first, which is an approximation.",
    )
    cache_salt: str = Field(
        OPTIONS.cache_salt,
        description="Opaque. Cached prompts are shared among requests of the same salt only.",
        json_schema_extra={"maxLength": MAX_SALT},
    )

    def to_options(self) -> RequestOptions:
        """Checked options. Raises InvalidRequest."""
        return RequestOptions(
            priority=self.priority,
            timeout_s=self.timeout_s,
            overflow=self.overflow,
            cache_salt=self.cache_salt,
        )


class SamplingFields(OptionFields):
    """How to choose tokens, beside how a request is treated: of every route that generates."""

    n: int = Field(
        1,
        description="Choices for each prompt. Their random numbers depend on the seed and their "
        "number.",
        json_schema_extra=bounds(1, MAX_CHOICES),
    )
    max_tokens: int | None = Field(
        DEFAULTS.max_tokens,
        description="Tokens to generate; null: as many as the context has room for.",
        json_schema_extra=bounds(1, MAX_INT),
    )
    temperature: float = Field(
        DEFAULTS.temperature,
        description="Logits are divided by it; 0 takes the likeliest token.",
        json_schema_extra=bounds(0, 100),
    )
    top_k: int = Field(
        DEFAULTS.top_k,
        description="Keep the k likeliest tokens; 0 keeps all.",
        json_schema_extra=bounds(0, MAX_INT),
    )
    top_p: float = Field(
        DEFAULTS.top_p,
        description="Keep the smallest set of likeliest tokens whose mass reaches p (nucleus).",
        json_schema_extra=bounds(0, 1, open_low=True),
    )
    min_p: float = Field(
        DEFAULTS.min_p,
        description="Keep tokens at least min_p times as likely as the likeliest.",
        json_schema_extra=bounds(0, 1),
    )
    repetition_penalty: float = Field(
        DEFAULTS.repetition_penalty,
        description="Makes tokens of prompt and output less likely (CTRL); 1 does nothing.",
        json_schema_extra=bounds(0.01, 100),
    )
    presence_penalty: float = Field(
        DEFAULTS.presence_penalty,
        description="Subtracted once from the logits of tokens that the output has.",
        json_schema_extra=bounds(-100, 100),
    )
    frequency_penalty: float = Field(
        DEFAULTS.frequency_penalty,
        description="Subtracted from a token's logit for each time that the output has it.",
        json_schema_extra=bounds(-100, 100),
    )
    seed: int | None = Field(
        DEFAULTS.seed,
        description="Same prompt, parameters and seed: the same tokens. null: drawn.",
        json_schema_extra=bounds(0, 2**SEED_BITS - 1),
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
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = Field(
        {},
        description=f"Added to the logits of token ids; -100 all but forbids a token. Up to "
        f"{MAX_BIASES}.",
        json_schema_extra={
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number"} | bounds(-MAX_BIAS, MAX_BIAS),
        },
    )
    response_format: ResponseFormat | None = Field(
        None, description="A JSON schema, or any JSON object, that the output must be."
    )
    regex: str | None = Field(
        None,
        description="A regular expression that the whole output must match.",
        json_schema_extra={"maxLength": MAX_GRAMMAR},
    )
    choice: list[str] | None = Field(None, description="Texts, of which the output must be one.")
    rope: RopeBody | None = Field(
        None,
        description="Stretch this request's context: another rotation than the model's own, such "
        'as `{"type": "ntk", "factor": 4}`. The context follows the factor.',
    )

    def num_logprobs(self) -> int | None:
        """How many of the likeliest to give with each token; None: no log-probabilities."""
        return None

    def to_params(self) -> SamplingParams:
        """Checked sampling parameters. Raises InvalidRequest."""
        fields = {
            name: getattr(self, name)
            for name in SamplingParams.__struct_fields__
            if name not in ("logprobs", "grammar")
        }
        fields["grammar"] = self.grammar()
        fields["logprobs"] = self.num_logprobs()
        stop = () if self.stop is None else self.stop
        fields["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        fields["stop_token_ids"] = tuple(self.stop_token_ids)
        if self.rope is not None:
            fields["rope"] = self.rope.scaling()
        return SamplingParams(**fields)

    def grammar(self) -> Grammar | None:
        """What the output must obey. Raises InvalidRequest."""
        found: dict[str, Grammar | None] = {}
        if self.response_format is not None:
            found["response_format"] = self.response_format.grammar()
        if self.regex is not None:
            found["regex"] = Grammar("regex", self.regex)
        if self.choice is not None:
            if not self.choice or not all(self.choice):
                raise InvalidRequest("choice must hold texts that are not empty", "choice")
            found["choice"] = Grammar("choice", json.dumps(self.choice))
        if len(found) > 1:
            raise InvalidRequest(f"{' and '.join(found)} cannot go together", list(found)[1])
        return next(iter(found.values()), None)

    def num_choices(self) -> int:
        """`n`, checked. Raises InvalidRequest."""
        within("n", self.n, 1, MAX_CHOICES)
        return self.n


def prompts_of(prompt: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """The prompts, one or several."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return [cast("str | list[int]", prompt)]
    return prompt


class LogprobsField(SamplingFields):
    """Of the routes whose `logprobs` is a number."""

    logprobs: int | None = Field(
        DEFAULTS.logprobs,
        description="Give each token's log-probability and those of the k likeliest.",
        json_schema_extra=bounds(0, MAX_LOGPROBS),
    )

    def num_logprobs(self) -> int | None:
        """As asked."""
        return self.logprobs


class GenerateRequest(LogprobsField):
    """A prompt or several, and how to choose the tokens that follow."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "The old captain", "max_tokens": 64}]}
    )

    prompt: Prompts = Field(
        description="The text to continue, or its token ids; or a list of such prompts. At least "
        "one token each."
    )
    stream: bool = Field(True, description="Server-sent events; false: one JSON body at the end.")
    echo: bool = Field(
        False,
        description="Give the prompt as well: before the text, or as an `event: prompt` before "
        "the tokens.",
    )
