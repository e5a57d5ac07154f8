"""One streamed request as its reader feels it: when each token came, and how it ended.

http.client and not an asynchronous client: under Locust, gevent makes its sockets cooperative.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any

from loadtest.load.address import Address

OK, LEFT, CUT = "ok", "left", "connection_lost"
"""Outcomes beside the server's error codes: complete, left by its client, ended without an end."""

READ_BYTES = 1 << 16


@dataclass
class Generation:
    """What was seen of a request; times in seconds.

    at: when it came, of time.time(); late: how long after that the client got to send it.
    first: from `at` to the first token, None where there was none; gaps: from token to token
    (tokens that came in one piece have gaps of 0); total: from `at` to the end.
    """

    scenario: str
    at: float
    prompt_tokens: int
    late: float = 0.0
    outcome: str = CUT
    status: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        """How many came."""
        return 0 if self.first is None else 1 + len(self.gaps)

    @property
    def failed(self) -> bool:
        """Whether the server is to blame for how it ended."""
        return self.outcome not in (OK, LEFT)

    @property
    def tokens_per_s(self) -> float | None:
        """What its reader saw after the first token; None where there were fewer than two."""
        return len(self.gaps) / spent if (spent := sum(self.gaps)) else None


class Client:
    """Reads streams of one server."""

    def __init__(self, address: Address, timeout: float) -> None:
        """timeout: seconds of silence, after which a stream is given up."""
        self._address = address
        self._timeout = timeout

    def token_ids(self, text: str) -> list[int]:
        """What the server's tokenizer makes of a text. Raises OSError, RuntimeError."""
        connection = self._address.connection(self._timeout)
        try:
            response = self._post(connection, "/tokenize", {"text": text})
            content = response.read()
            if response.status != 200:
                raise RuntimeError(f"/tokenize answered {response.status}: {content!r}")
            return list(json.loads(content)["token_ids"])
        finally:
            connection.close()

    def run(
        self,
        generation: Generation,
        prompt: tuple[int, ...],
        max_tokens: int,
        leaves_after: int | None,
    ) -> None:
        """Send a request and note in `generation` what comes; errors are outcomes."""
        start = time.time()
        generation.late = max(0.0, start - generation.at)
        # From here on by the clock that is never set.
        began = time.perf_counter() - generation.late
        connection = self._address.connection(self._timeout)
        body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "seed": 1}
        try:
            response = self._post(connection, "/generate", body)
            generation.status = response.status
            if response.status != 200:
                generation.outcome = _code(response.read())
            else:
                _read(response, generation, began, leaves_after)
        except (OSError, http.client.HTTPException) as error:
            generation.outcome = CUT if generation.status else type(error).__name__
        finally:
            generation.total = time.perf_counter() - began
            connection.close()

    def _post(
        self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any]
    ) -> http.client.HTTPResponse:
        headers = self._address.headers | {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        return connection.getresponse()


def _code(body: bytes) -> str:
    """The code of an error's body, or the beginning of what is none."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return repr(body[:40])


def _read(
    response: http.client.HTTPResponse,
    generation: Generation,
    began: float,
    leaves_after: int | None,
) -> None:
    """Events until `done`, `error`, the end of the connection or of the client's patience."""
    rest = b""
    last = began
    while piece := response.read1(READ_BYTES):
        now = time.perf_counter()
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if b"event: token\n" in event:
                if generation.first is None:
                    generation.first = now - began
                else:
                    generation.gaps.append(now - last)
                last = now
            elif event.startswith(b"event: done\n"):
                data = json.loads(event.partition(b"\ndata: ")[2])
                generation.cached_tokens = data["usage"]["cached_tokens"]
                generation.outcome = OK
                return
            elif event.startswith(b"event: error\n"):
                generation.outcome = json.loads(event.partition(b"\ndata: ")[2])["code"]
                return
        if leaves_after is not None and generation.tokens >= leaves_after:
            generation.outcome = LEFT
            return
