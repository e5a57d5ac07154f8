"""Clients that read a server's streams as it comes, slowly, in part or whole, and what they got."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from engine import Completion

Manner = Literal["read", "slow", "leave", "whole"]
"""How a client behaves: reads as it comes; slowly, over a narrow socket; leaves in the middle;
asks for one JSON body."""

MANNERS: tuple[Manner, ...] = ("read", "read", "read", "slow", "slow", "leave", "leave", "whole")
NARROW_BYTES = 4096
SLOW_BYTES, SLOW_SECONDS = 2048, 0.03
RETRY = (429, 503)


@dataclass
class Seen:
    """What a client got. tokens: (index, token id, log-probability); end: `done`, `left` or what
    went wrong."""

    tokens: list[tuple[int, int, float]] = field(default_factory=list)
    text: str = ""
    end: str = "nothing came"
    finish_reason: str | None = None

    def difference(self, alone: Completion) -> str | None:
        """How it differs from the run alone, of which a client that left has seen a beginning."""
        assert alone.logprobs is not None
        logprobs = [each.logprob for each in alone.logprobs]
        expected = list(zip(range(len(logprobs)), alone.token_ids, logprobs, strict=True))
        if self.end not in ("done", "left"):
            return self.end
        if self.tokens != expected[: len(self.tokens)]:
            return "tokens or log-probabilities differ from the run alone"
        if self.end == "left":
            return None if alone.text.startswith(self.text) else "text differs from the run alone"
        if len(self.tokens) != len(expected) or self.finish_reason != alone.finish_reason:
            return f"ended by {self.finish_reason} after {len(self.tokens)} of {len(expected)}"
        return None if self.text == alone.text else "text differs from the run alone"


def narrow_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket whose buffer is full after a few events."""
    family, kind, protocol = address[:3]
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, NARROW_BYTES)
    return made


class Crowd:
    """The clients of one round."""

    def __init__(self, url: str, rng: random.Random, output_tokens: int) -> None:
        self._url = url
        self._rng = rng
        self._output_tokens = output_tokens
        self.tokens = 0
        self.retries = 0
        self.over = False

    async def stream(self, body: dict[str, Any], manner: Manner) -> Seen:
        """One client, from its arrival to its end; refusals that say so are tried again."""
        narrow = manner == "slow"
        connector = aiohttp.TCPConnector(socket_factory=narrow_socket if narrow else None)
        patience = self._rng.randrange(self._output_tokens) if manner == "leave" else None
        await asyncio.sleep(self._rng.random())
        seen = Seen()
        try:
            async with aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None)
            ) as session:
                while not await self._ask(session, body, manner, patience, seen):
                    self.retries += 1
                    await asyncio.sleep(0.2 + 0.3 * self._rng.random())
        except (aiohttp.ClientError, ConnectionError) as error:
            seen.end = f"the connection broke: {error!r}"
        return seen

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        body: dict[str, Any],
        manner: Manner,
        patience: int | None,
        seen: Seen,
    ) -> bool:
        """False: refused for now."""
        body = body | {"stream": manner != "whole"}
        async with session.post(f"{self._url}/generate", json=body) as response:
            if response.status in RETRY and "Retry-After" in response.headers:
                return False
            if response.status != 200:
                seen.end = f"{response.status}: {await response.text()}"
            elif manner == "whole":
                self._take_whole(await response.json(), seen)
            else:
                await self._follow(response.content, manner == "slow", patience, seen)
            if seen.end == "left":
                response.close()
        return True

    def _take_whole(self, answer: dict[str, Any], seen: Seen) -> None:
        logprobs = (each["logprob"] for each in answer["logprobs"])
        seen.tokens = [
            (at, token_id, logprob)
            for at, (token_id, logprob) in enumerate(
                zip(answer["token_ids"], logprobs, strict=True)
            )
        ]
        self.tokens += len(seen.tokens)
        seen.text, seen.finish_reason, seen.end = answer["text"], answer["finish_reason"], "done"

    async def _follow(
        self, content: aiohttp.StreamReader, slow: bool, patience: int | None, seen: Seen
    ) -> None:
        waiting = b""
        while part := await content.read(SLOW_BYTES if slow else 1 << 16):
            *events, waiting = (waiting + part).split(b"\n\n")
            for event in events:
                self._take(event, seen)
            if patience is not None and len(seen.tokens) >= patience and seen.end != "done":
                seen.end = "left"
                return
            if slow:
                await asyncio.sleep(SLOW_SECONDS)
        if seen.end == "nothing came":
            seen.end = f"the stream broke off after {len(seen.tokens)} tokens"

    def _take(self, event: bytes, seen: Seen) -> None:
        fields = dict(line.split(": ", 1) for line in event.decode().split("\n"))
        if "event" not in fields:  # a comment
            return
        data = json.loads(fields["data"])
        match fields["event"]:
            case "token":
                assert int(fields["id"]) == data["index"]
                seen.tokens.append((data["index"], data["token_id"], data["logprob"]))
                seen.text += data["text"]
                self.tokens += 1
            case "done":
                seen.end, seen.finish_reason = "done", data["finish_reason"]
            case _:
                seen.end = f"failed: {data['code']}"
