"""The streams and bodies of /v1/completions and /v1/chat/completions.

A stream ends by `data: [DONE]` where it succeeded; one that could not finish ends by a chunk that
has an `error` and nothing after it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import EngineError
from engine.frontend.output import TokenDelta
from engine.frontend.stream import Stream
from engine.frontend.tokenizer import Tokenizer
from server.collect import Outputs
from server.errors import openai_error, status_of
from server.openai.answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    OpenAIUsage,
    chat_logprobs,
    completion_logprobs,
    joined,
    prompt_logprobs,
)

DONE = b"data: [DONE]\n\n"


class OpenAIEvents(ABC):
    """What both kinds share."""

    prefix = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        streams: Sequence[Stream],
        num_choices: int,
        tokenizer: Tokenizer,
        *,
        include_usage: bool = False,
    ) -> None:
        """num_choices: of each prompt; include_usage: a chunk with the usage before the end."""
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        self._streams = streams
        self._num_choices = num_choices
        self._tokenizer = tokenizer
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode

    @abstractmethod
    def _chunk(self, choices: list[Any], usage: OpenAIUsage | None = None) -> object: ...

    @abstractmethod
    def _finished(self, stream: Stream) -> object:
        """The last choice of a stream."""

    def _usage(self) -> OpenAIUsage:
        return OpenAIUsage.of(self._streams)

    def _index(self, stream: Stream) -> int:
        """Choices are counted over all prompts."""
        return stream.prompt * self._num_choices + stream.choice

    def _data(self, content: object) -> bytes:
        return b"data: %b\n\n" % self._encode(content)

    def finish(self, stream: Stream) -> bytes:
        """Why one choice ended."""
        return self._data(self._chunk([self._finished(stream)]))

    def end(self) -> bytes:
        """The usage, where it was asked for, and the end."""
        if not self._include_usage:
            return DONE
        return self._data(self._chunk([], self._usage())) + DONE

    def error(self, error: EngineError) -> bytes:
        """No [DONE] follows."""
        detail = openai_error(status_of(error), error.code, str(error))
        return self._data({"error": detail})


class CompletionEvents(OpenAIEvents):
    """Of /v1/completions."""

    prefix = "cmpl"

    def __init__(
        self, *args: Any, echo: bool, logprobs: bool, prompt_only: bool = False, **settings: Any
    ) -> None:
        """echo: each text begins with its prompt, scored where logprobs are asked for; prompt_only:
        and ends with it."""
        super().__init__(*args, **settings)
        self._echo = echo
        self._logprobs = logprobs
        self._prompt_only = prompt_only
        self._offsets = dict.fromkeys(self._streams, 0)
        self._to_echo = set(self._streams if echo else ())

    def _chunk(self, choices: list[Any], usage: OpenAIUsage | None = None) -> Completion:
        return Completion(**self._head, choices=choices, usage=usage)

    def _usage(self) -> OpenAIUsage:
        return OpenAIUsage.of(self._streams, prompt_only=self._prompt_only)

    def _finished(self, stream: Stream) -> CompletionChoice:
        return CompletionChoice(self._index(stream), "", None, stream.finish_reason)

    def begin(self) -> bytes:
        """The prompts, where they are to be echoed; their log-probabilities come later."""
        if not self._echo or self._logprobs:
            return b""
        return self._data(self._chunk([self._prompt(stream) for stream in self._streams]))

    def _prompt(self, stream: Stream) -> CompletionChoice:
        """The prompt of a stream, now that it is to be shown."""
        self._to_echo.discard(stream)
        token_ids = stream.prompt_token_ids
        text = self._tokenizer.decode(token_ids)
        self._offsets[stream] = len(text)
        logprobs = (
            prompt_logprobs(token_ids, stream.scores or [], self._tokenizer)
            if self._logprobs
            else None
        )
        return CompletionChoice(self._index(stream), text, logprobs, None)

    def _continuation(self, stream: Stream, deltas: Sequence[TokenDelta]) -> CompletionChoice:
        """What some tokens add."""
        if self._prompt_only:
            deltas = ()
        text = "".join(delta.text for delta in deltas)
        logprobs = completion_logprobs(deltas, self._offsets[stream], self._tokenizer)
        self._offsets[stream] += len(text)
        return CompletionChoice(self._index(stream), text, logprobs, None)

    def tokens(self, stream: Stream, deltas: Sequence[TokenDelta]) -> bytes:
        """One chunk for what came together; none for tokens that show nothing."""
        choices = [self._prompt(stream)] if stream in self._to_echo else []
        choices.append(self._continuation(stream, deltas))
        return b"".join(
            self._data(self._chunk([choice]))
            for choice in choices
            if choice.text or choice.logprobs is not None
        )

    def body(self, outputs: Outputs) -> bytes:
        """The whole answer."""
        choices = []
        for stream, deltas in outputs:
            parts = [self._prompt(stream)] if self._echo else []
            parts.append(self._continuation(stream, deltas))
            known = [part.logprobs for part in parts if part.logprobs is not None]
            choices.append(
                CompletionChoice(
                    self._index(stream),
                    "".join(part.text for part in parts),
                    joined(known) if known else None,
                    stream.finish_reason,
                )
            )
        return self._encode(self._chunk(choices, self._usage()))


class ChatEvents(OpenAIEvents):
    """Of /v1/chat/completions."""

    prefix = "chatcmpl"

    def _chunk(self, choices: list[Any], usage: OpenAIUsage | None = None) -> ChatChunk:
        return ChatChunk(**self._head, choices=choices, usage=usage)

    def _finished(self, stream: Stream) -> ChatChunkChoice:
        return ChatChunkChoice(self._index(stream), {}, None, stream.finish_reason)

    def begin(self) -> bytes:
        """Whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return b"".join(
            self._data(self._chunk([ChatChunkChoice(self._index(stream), delta, None, None)]))
            for stream in self._streams
        )

    def tokens(self, stream: Stream, deltas: Sequence[TokenDelta]) -> bytes:
        """One chunk for what came together; none for tokens that show nothing."""
        text = "".join(delta.text for delta in deltas)
        logprobs = chat_logprobs(deltas, self._tokenizer)
        if not text and logprobs is None:
            return b""
        choice = ChatChunkChoice(self._index(stream), {"content": text}, logprobs, None)
        return self._data(self._chunk([choice]))

    def body(self, outputs: Outputs) -> bytes:
        """The whole answer."""
        choices = [
            ChatChoice(
                self._index(stream),
                AssistantMessage("".join(delta.text for delta in deltas)),
                chat_logprobs(deltas, self._tokenizer),
                stream.finish_reason,
            )
            for stream, deltas in outputs
        ]
        answer = ChatCompletion(**self._head, choices=choices, usage=OpenAIUsage.of(self._streams))
        return self._encode(answer)
