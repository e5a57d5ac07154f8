"""The tokens of requests as they come, for those who read them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from engine.errors import EngineError, GrammarFailed
from engine.frontend.admission import Usage
from engine.frontend.output import OutputProcessor, TokenDelta
from engine.frontend.tokenizer import Tokenizer
from engine.messages import AddRequest, EngineOutput, TokenLogprobs
from engine.request import FinishReason


@dataclass(slots=True)
class Timing:
    """Moments of a request, in seconds after it was submitted; None until they happen.

    queue: how long it waited for its first step.
    """

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None

    @property
    def prefill(self) -> float | None:
        """Seconds from the first step to the first token."""
        if self.first_token is None or self.queue is None:
            return None
        return max(0.0, self.first_token - self.queue)

    def per_token(self, num_tokens: int) -> float | None:
        """Mean seconds between two tokens of num_tokens."""
        if self.first_token is None or self.total is None or num_tokens < 2:
            return None
        return (self.total - self.first_token) / (num_tokens - 1)


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """What another process needs to go on with a stream; its tokens travel beside it.

    submitted: when it was, on the clock that all processes of a machine share.
    """

    request: AddRequest
    prompt: int
    submitted: float
    timing: Timing
    finish_reason: FinishReason | None
    cached_tokens: int
    scores: list[TokenLogprobs] | None


class Stream:
    """The tokens of one request as they come: `async for deltas in stream`.

    Each step of the loop yields every token that came since the last one, so a slow reader gets
    fewer, larger pieces. After the loop finish_reason, usage and timing are settled, and scores
    where a text was to be scored. If the engine dies and is not started again, the tokens that came
    are yielded and then EngineDead is raised. Leaving early must be followed by close(), which
    frees the request's pages; `async with` does so.
    """

    def __init__(
        self,
        request: AddRequest,
        tokenizer: Tokenizer,
        close: Callable[[Stream], None],
        *,
        prompt: int = 0,
        news: asyncio.Event | None = None,
    ) -> None:
        """close: aborts it. prompt: which of a group's prompts; news: a group's, set at each token
        and at the end."""
        self.request_id = request.request_id
        self.prompt_token_ids = request.prompt_token_ids
        self.seed = request.seed
        self.prompt = prompt
        self.choice = request.choice
        self.scores: list[TokenLogprobs] | None = None
        self.timing = Timing()
        self.error: EngineError | None = None
        self.submitted = time.monotonic()
        self._request = request
        self._cached_tokens = 0
        self._token_ids: list[int] = []
        self._suspect_at: int | None = None
        self._output = OutputProcessor(tokenizer, request.params, frozenset(request.stop_token_ids))
        self._waiting: list[TokenDelta] = []
        self._news = asyncio.Event() if news is None else news
        self._close = close

    @property
    def target_token_ids(self) -> list[int]:
        """The tokens that `scores` are of, in order; none where nothing is scored."""
        targets = self._request.targets
        return [] if targets is None else targets.token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output is complete; None while it is not."""
        return self._output.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage.of(self._request, self._output.num_tokens, self._cached_tokens)

    def close(self) -> None:
        """Abort, unless the request has ended."""
        self._close(self)

    def deliver(self, output: EngineOutput) -> None:
        """Take a token, or the end without one, from the engine."""
        now = time.monotonic() - self.submitted
        if output.error is not None:
            self.fail(GrammarFailed(output.error))
            return
        if (delta := self._output.process(output)) is not None:
            self._waiting.append(delta)
            self._token_ids.append(delta.token_id)
            if self._suspect_at is not None and delta.index >= self._suspect_at:
                self._suspect_at = None
            if self.timing.first_token is None:
                self.timing.first_token = now
                self.timing.queue = output.queue_seconds
                self._cached_tokens = output.cached_tokens
                self.scores = output.scores
        if self.finish_reason is not None:
            self.timing.total = now
        self._news.set()

    def again(self, suspects: Mapping[str, int]) -> AddRequest:
        """The request for another engine, which goes on where this stream is: mostly where the one
        before died, or sooner, since tokens that were on their way died with it."""
        self._suspect_at = suspects.get(self.request_id, self._suspect_at)
        return msgspec.structs.replace(
            self._request,
            output_token_ids=self._token_ids,
            elapsed_s=time.monotonic() - self.submitted,
            suspect_at=self._suspect_at,
            targets=None if self._token_ids else self._request.targets,
        )

    def renew(self, request_id: str) -> AddRequest:
        """The request under another name, to go on where this stream is: what the engine said to
        the old name belongs to nobody."""
        self.request_id = request_id
        self._request = msgspec.structs.replace(self._request, request_id=request_id)
        return self.again({})

    @property
    def state(self) -> StreamState:
        """For another process."""
        return StreamState(
            request=self._request,
            prompt=self.prompt,
            submitted=self.submitted,
            timing=self.timing,
            finish_reason=self.finish_reason,
            cached_tokens=self._cached_tokens,
            scores=self.scores,
        )

    @classmethod
    def restored(
        cls,
        state: StreamState,
        tokens: Sequence[tuple[int, TokenLogprobs | None]],
        tokenizer: Tokenizer,
        close: Callable[[Stream], None],
        news: asyncio.Event,
    ) -> Stream:
        """A stream that has come as far as another was, with all its tokens to take again.

        tokens: all that it had, with their log-probabilities.
        """
        stream = cls(state.request, tokenizer, close, prompt=state.prompt, news=news)
        ended = state.finish_reason
        timeout = ended is FinishReason.TIMEOUT
        for index, (token_id, logprobs) in enumerate(tokens):
            last = index == len(tokens) - 1 and not timeout
            stream.deliver(
                EngineOutput(stream.request_id, index, token_id, ended if last else None, logprobs)
            )
        if timeout:
            stream.deliver(EngineOutput(stream.request_id, len(tokens), None, ended))
        stream.submitted = state.submitted
        stream.timing = state.timing
        stream._cached_tokens = state.cached_tokens
        stream.scores = state.scores
        return stream

    def fail(self, error: EngineError) -> None:
        """End the stream by an error."""
        self.error = error
        self._news.set()

    def take(self) -> list[TokenDelta]:
        """What came since the last time."""
        deltas, self._waiting = self._waiting, []
        return deltas

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._waiting:
            if self.finish_reason is not None:
                raise StopAsyncIteration
            if self.error is not None:
                raise self.error
            self._news.clear()
            await self._news.wait()
        return self.take()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Piece:
    """What came of one stream since the last time. ended: it was the last of it."""

    stream: Stream
    deltas: list[TokenDelta]
    ended: bool


class StreamGroup:
    """Streams that are read together: the choices for one prompt, or for several.

    `async for pieces in group` yields what came of each since the last time. Where one of them
    fails, its error is raised once its tokens were yielded, and the group has failed.
    """

    def __init__(self, streams: Sequence[Stream], news: asyncio.Event) -> None:
        """streams: by prompt, and by choice within each. news: set when anything comes."""
        self.streams = list(streams)
        self._open = [stream for stream in streams if stream.finish_reason is None]
        self._news = news

    @property
    def state(self) -> list[StreamState]:
        """Of its streams, for another process."""
        return [stream.state for stream in self.streams]

    def close(self) -> None:
        """Abort what has not ended."""
        for stream in self.streams:
            stream.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Piece]:
        while self._open:
            self._news.clear()
            pieces = []
            for stream in self._open:
                deltas, ended = stream.take(), stream.finish_reason is not None
                if deltas or ended:
                    pieces.append(Piece(stream, deltas, ended))
            if pieces:
                self._open = [stream for stream in self._open if stream.finish_reason is None]
                return pieces
            for stream in self._open:
                if stream.error is not None:
                    raise stream.error
            await self._news.wait()
        raise StopAsyncIteration
