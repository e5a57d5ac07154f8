"""What OpenAI's clients send: their fields, and ours beside them.

null stands for a field's default, as their clients send it. What is theirs and not supported is
refused by its name; so is what nobody knows.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.errors import InvalidRequest
from engine.params import MAX_INT, MAX_LOGPROBS, SamplingParams, within
from server.schemas import LogprobsField, Prompts, RequestModel, SamplingFields, bounds

MAX_MESSAGES = 1024


def _refuse(body: object, names: tuple[str, ...]) -> object:
    """Drop nulls; name the first field that is not supported."""
    if not isinstance(body, dict):
        return body
    given = {name: value for name, value in body.items() if value is not None}
    for name in names:
        if name in given:
            raise PydanticCustomError(
                "unsupported", "{field} is not supported by this server", {"field": name}
            )
    return given


class StreamOptions(RequestModel):
    """include_usage: a last chunk with the tokens of all choices."""

    include_usage: bool = False


class OpenAIRequest(SamplingFields):
    """What both kinds of completion share."""

    unsupported: ClassVar[tuple[str, ...]] = ()

    model: str = Field(description="As /v1/models names it.")
    stream: bool = Field(False, description="Server-sent events, ended by [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only where `stream` is true.")
    user: str | None = Field(None, description="For the log; it changes nothing.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: object) -> object:
        return _refuse(body, cls.unsupported)

    def check(self) -> None:
        """What the fields mean together. Raises InvalidRequest."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options needs stream to be true, got false", "stream_options"
            )

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(OpenAIRequest, LogprobsField):
    """POST /v1/completions."""

    unsupported: ClassVar[tuple[str, ...]] = ("suffix",)

    prompt: Prompts = Field(description="Text, token ids, or a list of such prompts.")
    max_tokens: int | None = Field(
        16,
        description="Tokens to generate; 0 with `echo`: only the prompt.",
        json_schema_extra=bounds(0, MAX_INT),
    )
    echo: bool = Field(
        False, description="Begin each text with its prompt; `logprobs` are then given for it too."
    )
    best_of: int | None = Field(None, description="Must be `n`: nothing is chosen from more.")

    def check(self) -> None:
        """What the fields mean together. Raises InvalidRequest."""
        super().check()
        if self.best_of is not None and self.best_of != self.n:
            raise InvalidRequest(
                f"best_of must be n ({self.n}), got {self.best_of}: choosing from more is not "
                f"supported",
                "best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens must be at least 1 without echo, got 0", "max_tokens")

    @property
    def prompt_only(self) -> bool:
        """Nothing is to be generated: the prompt is to be shown, or scored."""
        return self.max_tokens == 0

    def to_params(self) -> SamplingParams:
        """Checked sampling parameters; the engine generates at least one token. Raises
        InvalidRequest."""
        if not self.prompt_only:
            return super().to_params()
        return self.model_copy(update={"max_tokens": 1, "ignore_eos": True}).to_params()


def _content(value: object) -> object:
    """Text parts are joined; other parts are refused."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
        for part in value
    ):
        return "".join(part["text"] for part in value)
    raise PydanticCustomError("content", "must be a text or a list of parts of type text")


class Message(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str,
        BeforeValidator(
            _content,
            json_schema_input_type=str | list[dict[Literal["type", "text"], str]],
        ),
    ]
    name: str | None = None


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[tuple[str, ...]] = (
        "audio",
        "function_call",
        "functions",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "reasoning_effort",
        "store",
        "tool_choice",
        "tools",
        "web_search_options",
    )

    messages: list[Message] = Field(description="The conversation so far; the answer follows.")
    max_completion_tokens: int | None = Field(
        None,
        description="The newer name of `max_tokens`; not both.",
        json_schema_extra=bounds(1, MAX_INT),
    )
    logprobs: bool = Field(False, description="Give each token's log-probability.")
    top_logprobs: int | None = Field(
        None,
        description="With `logprobs`: and those of the k likeliest.",
        json_schema_extra=bounds(0, MAX_LOGPROBS),
    )

    def check(self) -> None:
        """What the fields mean together. Raises InvalidRequest."""
        super().check()
        if not self.messages:
            raise InvalidRequest("messages must hold at least one message, got none", "messages")
        if len(self.messages) > MAX_MESSAGES:
            raise InvalidRequest(
                f"messages takes at most {MAX_MESSAGES} messages, got {len(self.messages)}",
                "messages",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        if self.top_logprobs is not None:
            within("top_logprobs", self.top_logprobs, 0, MAX_LOGPROBS)
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise InvalidRequest(
                    "max_completion_tokens and max_tokens are the same; give one of them",
                    "max_completion_tokens",
                )
            within("max_completion_tokens", self.max_completion_tokens, 1, MAX_INT)

    def num_logprobs(self) -> int | None:
        """top_logprobs, where log-probabilities are asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self) -> list[dict[str, Any]]:
        """As chat templates expect it; they know a developer as the system."""
        turns = []
        for message in self.messages:
            role = "system" if message.role == "developer" else message.role
            turn = {"role": role, "content": message.content}
            turns.append(turn if message.name is None else turn | {"name": message.name})
        return turns
