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
from server.openai_answers import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    OpenAIUsage,
    chat_logprobs,
    completion_logprobs,
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
        return self._data(self._chunk([], OpenAIUsage.of(self._streams))) + DONE

    def error(self, error: EngineError) -> bytes:
        """No [DONE] follows."""
        detail = openai_error(status_of(error), error.code, str(error))
        return self._data({"error": detail})


class CompletionEvents(OpenAIEvents):
    """Of /v1/completions."""

    prefix = "cmpl"

    def __init__(self, *args: Any, echo: bool, **settings: Any) -> None:
        """echo: each text begins with its prompt."""
        super().__init__(*args, **settings)
        self._echo = echo
        self._offsets = dict.fromkeys(self._streams, 0)

    def _chunk(self, choices: list[Any], usage: OpenAIUsage | None = None) -> Completion:
        return Completion(**self._head, choices=choices, usage=usage)

    def _finished(self, stream: Stream) -> CompletionChoice:
        return CompletionChoice(self._index(stream), "", None, stream.finish_reason)

    def _prompt(self, stream: Stream) -> str:
        return self._tokenizer.decode(stream.prompt_token_ids) if self._echo else ""

    def _logprobs(
        self, stream: Stream, deltas: Sequence[TokenDelta]
    ) -> tuple[str, CompletionLogprobs | None]:
        """The text of some tokens, and what is known of each."""
        text = "".join(delta.text for delta in deltas)
        logprobs = completion_logprobs(deltas, self._offsets[stream], self._tokenizer)
        self._offsets[stream] += len(text)
        return text, logprobs

    def begin(self) -> bytes:
        """The prompts, where they are to be echoed."""
        if not self._echo:
            return b""
        choices = []
        for stream in self._streams:
            text = self._prompt(stream)
            self._offsets[stream] = len(text)
            choices.append(CompletionChoice(self._index(stream), text, None, None))
        return self._data(self._chunk(choices))

    def tokens(self, stream: Stream, deltas: Sequence[TokenDelta]) -> bytes:
        """One chunk for what came together; none for tokens that show nothing."""
        text, logprobs = self._logprobs(stream, deltas)
        if not text and logprobs is None:
            return b""
        choice = CompletionChoice(self._index(stream), text, logprobs, None)
        return self._data(self._chunk([choice]))

    def body(self, outputs: Outputs) -> bytes:
        """The whole answer."""
        choices = []
        for stream, deltas in outputs:
            prompt = self._prompt(stream)
            self._offsets[stream] = len(prompt)
            text, logprobs = self._logprobs(stream, deltas)
            choices.append(
                CompletionChoice(self._index(stream), prompt + text, logprobs, stream.finish_reason)
            )
        return self._encode(self._chunk(choices, OpenAIUsage.of(self._streams)))


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
