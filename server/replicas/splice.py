"""Several attempts at one stream, joined so that the client sees one.

A replica that dies takes its streams with it. The same prompt, parameters and seed give the same
tokens to the bit, so another replica is asked the same again; what the client has already is left
out, and compared: where the second attempt differs, the stream ends by an error and not by a
mixture of two answers.
"""

from __future__ import annotations

from collections.abc import Iterator


class Diverged(Exception):
    """A replayed token differs from the one that was sent."""


class Splice:
    """Server-sent events in, those that the client lacks out."""

    def __init__(self) -> None:
        """Before the first attempt."""
        self._sent: list[bytes] = []
        self._seen = 0
        self._rest = b""
        self.ended = False

    def again(self) -> None:
        """The next bytes are another attempt's first."""
        self._seen, self._rest, self.ended = 0, b"", False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Whole events to send on. Raises Diverged.

        `ended` is set by the last event, whose kind is the caller's to judge.
        """
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if b"event: token\n" in event:
                self._seen += 1
                if self._seen <= len(self._sent):
                    if event != self._sent[self._seen - 1]:
                        raise Diverged(f"token {self._seen - 1} differs when it is computed again")
                    continue
                self._sent.append(event)
            elif event.startswith((b"event: done\n", b"event: error\n")):
                self.ended = True
            yield event + b"\n\n"
