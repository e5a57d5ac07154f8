"""What OpenAI's clients read: chunks of a stream, and bodies.

One chunk holds all tokens of a choice that came together. Dataclasses, since msgspec writes them
fast and FastAPI documents them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.frontend.output import Detokenizer, TokenDelta
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
    def of(cls, streams: Sequence[Stream], *, prompt_only: bool = False) -> OpenAIUsage:
        """Of streams that have ended. prompt_only: what they generated was not asked for."""
        usage = UsageBody.total(streams)
        completion_tokens = 0 if prompt_only else usage.completion_tokens
        return cls(
            usage.prompt_tokens,
            completion_tokens,
            usage.prompt_tokens + completion_tokens,
            PromptTokensDetails(usage.cached_tokens),
        )


@dataclass(frozen=True)
class CompletionLogprobs:
    """Of each token, in order; None for the first of a prompt, which nothing is before.

    text_offset: where its text begins, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


@dataclass(frozen=True)
class CompletionChoice:
    """A text, or what came of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What all bodies and chunks begin with. created: seconds since 1970."""

    id: str
    object: str
    created: int
    model: str


@dataclass(frozen=True, kw_only=True)
class Completion(Answer):
    """The body of /v1/completions, or one chunk of its stream."""

    object: Literal["text_completion"] = "text_completion"
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
class ChatCompletion(Answer):
    """The body of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
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
class ChatChunk(Answer):
    """One chunk of the stream of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: OpenAIUsage | None = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is served. max_model_len: its context in tokens, under its own rotation."""

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


def joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    """Those of a prompt and of what follows it."""
    return CompletionLogprobs(
        [token for part in parts for token in part.tokens],
        [logprob for part in parts for logprob in part.token_logprobs],
        [top for part in parts for top in part.top_logprobs],
        [offset for part in parts for offset in part.text_offset],
    )


def prompt_logprobs(
    token_ids: Sequence[int], scores: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> CompletionLogprobs:
    """Of a prompt; scores: of its tokens but the first."""
    tokens = [token_text(token_id, tokenizer) for token_id in token_ids]
    offsets, decoder, offset = [], Detokenizer(tokenizer), 0
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(decoder.push(token_id))
    tops = [
        {token_text(token_id, tokenizer): logprob for token_id, logprob in score.top}
        for score in scores
    ]
    return CompletionLogprobs(
        tokens, [None, *(score.logprob for score in scores)], [None, *tops], offsets
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
