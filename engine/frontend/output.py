"""From token ids to text that may be shown: no half characters, nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from engine.frontend.tokenizer import Tokenizer
from engine.messages import EngineOutput, TokenLogprobs
from engine.params import SamplingParams
from engine.request import FinishReason


class Detokenizer:
    """Bytes of tokens in, whole characters out.

    However the bytes are cut, the pieces join to what `bytes.decode("utf-8", "replace")` gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left of an unfinished character: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Lets text through up to the stop string that is complete first.

    Text that may be the beginning of one waits. The outcome depends on the text alone, not on how
    it arrives in pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show now."""
        if not self._stop or not text:
            return text
        text = self._held + text
        matches = [
            (at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0
        ]
        if matches:
            _, start, self.found = min(matches)
            self._held = ""
            return text[:start]
        held = max(self._overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What waited, now that no stop string can come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of text that begins stop."""
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """One token and the text that became showable with it.

    index: the token's place in the stream, from 0.
    """

    index: int
    token_id: int
    text: str
    logprobs: TokenLogprobs | None = None


class OutputProcessor:
    """The output of one request, from EngineOutput to TokenDelta."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, stop_ids: frozenset[int]
    ) -> None:
        """stop_ids: end tokens, whose text is never shown."""
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(params.stop)
        self._stop_ids = stop_ids
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0

    def process(self, output: EngineOutput) -> TokenDelta | None:
        """The delta of an output. Sets finish_reason with the last one.

        None: the request timed out, without a token; text that waited, since it might have been
        half a character or the beginning of a stop string, is not shown.

        A stop string ends the request here, before the core knows: the caller aborts it there.
        """
        if output.token_id is None:
            self.finish_reason = output.finish_reason
            return None
        self.num_tokens += 1
        stopped = output.finish_reason is FinishReason.STOP and output.token_id in self._stop_ids
        text = "" if stopped else self._detokenizer.push(output.token_id)
        if output.finish_reason is not None:
            text += self._detokenizer.flush()
        text = self._stop_strings.push(text)
        if self._stop_strings.found is not None:
            self.finish_reason = FinishReason.STOP
        elif output.finish_reason is not None:
            text += self._stop_strings.flush()
            self.finish_reason = output.finish_reason
        return TokenDelta(output.index, output.token_id, text, output.logprobs)
