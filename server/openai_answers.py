"""What OpenAI's clients read: chunks of a stream, and bodies.

One chunk holds all tokens of a choice that came together. Dataclasses, since msgspec writes them
fast and FastAPI documents them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.frontend.output import TokenDelta
from engine.frontend.stream import Stream
from engine.frontend.tokenizer import Tokenizer
from engine.messages import TokenLogprobs
from server.answers import UsageBody


@dataclass(frozen=True)
class PromptTokensDetails:
    """cached_tokens: of the prompts, not computed again."""

    cached_tokens: int


@dataclass(frozen=True)
class OpenAIUsage:
    """Tokens of all choices; each prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, streams: Sequence[Stream]) -> OpenAIUsage:
        """Of streams that have ended."""
        usage = UsageBody.total(streams)
        return cls(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_tokens,
            PromptTokensDetails(usage.cached_tokens),
        )


@dataclass(frozen=True)
class CompletionLogprobs:
    """Of each token, in order. text_offset: where its text begins, in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


@dataclass(frozen=True)
class CompletionChoice:
    """A text, or what came of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The body of /v1/completions, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: OpenAIUsage | None = None


@dataclass(frozen=True)
class ChatTopLogprob:
    """A token that could have been; bytes: of its text, which may be half a character."""

    token: str
    bytes: list[int]
    logprob: float


@dataclass(frozen=True)
class ChatTokenLogprob(ChatTopLogprob):
    """The token that was taken."""

    top_logprobs: list[ChatTopLogprob]


@dataclass(frozen=True)
class ChatLogprobs:
    """Of each token of the content."""

    content: list[ChatTokenLogprob]


@dataclass(frozen=True)
class AssistantMessage:
    """The whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"


@dataclass(frozen=True)
class ChatChoice:
    """A whole answer, and why it ended."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class ChatCompletion:
    """The body of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: OpenAIUsage


@dataclass(frozen=True)
class ChatChunkChoice:
    """What came of an answer. delta: {role, content}, {content}, or nothing at its end."""

    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class ChatChunk:
    """One chunk of the stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is served. max_model_len: its context, in tokens."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ropeway"] = "ropeway"
    max_model_len: int


@dataclass(frozen=True)
class ModelList:
    """What can be asked for as `model`."""

    data: list[Model]
    object: Literal["list"] = "list"


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token as OpenAI shows it: text, or `bytes:\\xe2\\x82` where that is half a character."""
    for name, special_id in tokenizer.special_tokens.items():
        if special_id == token_id:
            return name
    content = tokenizer.token_bytes(token_id)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def completion_logprobs(
    deltas: Sequence[TokenDelta], offset: int, tokenizer: Tokenizer
) -> CompletionLogprobs | None:
    """offset: characters before the first of these. None where none were asked for."""
    known = [(delta, delta.logprobs) for delta in deltas if delta.logprobs is not None]
    if not known:
        return None
    offsets = []
    for delta, _ in known:
        offsets.append(offset)
        offset += len(delta.text)
    return CompletionLogprobs(
        [token_text(delta.token_id, tokenizer) for delta, _ in known],
        [logprobs.logprob for _, logprobs in known],
        [
            {token_text(token_id, tokenizer): logprob for token_id, logprob in logprobs.top}
            for _, logprobs in known
        ],
        offsets,
    )


def chat_logprobs(deltas: Sequence[TokenDelta], tokenizer: Tokenizer) -> ChatLogprobs | None:
    """None where none were asked for."""
    content = [
        _chat_token(delta.token_id, delta.logprobs, tokenizer)
        for delta in deltas
        if delta.logprobs is not None
    ]
    return ChatLogprobs(content) if content else None


def _chat_token(token_id: int, logprobs: TokenLogprobs, tokenizer: Tokenizer) -> ChatTokenLogprob:
    top = [_top(other, logprob, tokenizer) for other, logprob in logprobs.top]
    taken = _top(token_id, logprobs.logprob, tokenizer)
    return ChatTokenLogprob(taken.token, taken.bytes, taken.logprob, top)


def _top(token_id: int, logprob: float, tokenizer: Tokenizer) -> ChatTopLogprob:
    text = token_text(token_id, tokenizer)
    return ChatTopLogprob(text, list(tokenizer.token_bytes(token_id)), logprob)
