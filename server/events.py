"""The events of /generate.

    id: 0
    event: token
    data: {"index":0,"token_id":318,"text":" was"}

`event: done` ends a stream that succeeded, `event: error` one that could not finish. Where there
are several prompts or choices, ids are `prompt.choice.index` and each ends by `event: finish`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from pydantic import BaseModel

from engine.errors import EngineError
from engine.frontend.output import TokenDelta
from engine.frontend.stream import Stream
from engine.frontend.tokenizer import Tokenizer
from server.answers import (
    AllDoneEvent,
    DoneEvent,
    ErrorEvent,
    FinishEvent,
    PromptEvent,
    TokenEvent,
    TopLogprob,
    UsageBody,
)


def event_id(stream: Stream, index: int, *, several: bool) -> str:
    """Of a token's event. several: the answer has several prompts or choices."""
    return f"{stream.prompt}.{stream.choice}.{index}" if several else str(index)


def named_event(name: str, data: BaseModel | msgspec.Struct) -> bytes:
    """An event without an id, so that the last token's id stays the last."""
    body = (
        data.model_dump_json().encode()
        if isinstance(data, BaseModel)
        else msgspec.json.encode(data)
    )
    return b"event: %b\ndata: %b\n\n" % (name.encode(), body)


class GenerateEvents:
    """Writes one answer."""

    def __init__(self, streams: Sequence[Stream], tokenizer: Tokenizer, *, echo: bool) -> None:
        """streams: of the whole answer."""
        self._streams = streams
        self._tokenizer = tokenizer
        self._echo = echo
        self._several = len(streams) > 1
        self._encode = msgspec.json.Encoder().encode

    def begin(self) -> bytes:
        """The prompts, where they are to be echoed."""
        if not self._echo:
            return b""
        return b"".join(
            named_event(
                "prompt",
                PromptEvent(
                    stream.prompt_token_ids,
                    self._tokenizer.decode(stream.prompt_token_ids),
                    stream.prompt if self._several else None,
                ),
            )
            for stream in self._streams
            if stream.choice == 0
        )

    def tokens(self, stream: Stream, deltas: Sequence[TokenDelta]) -> bytes:
        """One event for each token."""
        prompt, choice = (stream.prompt, stream.choice) if self._several else (None, None)
        parts: list[bytes] = []
        for delta in deltas:
            logprob, top = None, None
            if delta.logprobs is not None:
                logprob = delta.logprobs.logprob
                top = TopLogprob.all_of(delta.logprobs, self._tokenizer)
            event = TokenEvent(
                delta.index, delta.token_id, delta.text, logprob, top, prompt, choice
            )
            name = event_id(stream, delta.index, several=self._several)
            head = f"id: {name}\nevent: token\ndata: ".encode()
            parts += (head, self._encode(event), b"\n\n")
        return b"".join(parts)

    def finish(self, stream: Stream) -> bytes:
        """One of several is complete."""
        return named_event("finish", FinishEvent.of(stream)) if self._several else b""

    def end(self) -> bytes:
        """All are complete."""
        if self._several:
            return named_event("done", AllDoneEvent(usage=UsageBody.total(self._streams)))
        return named_event("done", DoneEvent.of(self._streams[0]))

    def error(self, error: EngineError) -> bytes:
        """It could not finish."""
        return named_event("error", ErrorEvent(code=error.code, message=str(error)))
