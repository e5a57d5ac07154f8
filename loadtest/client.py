"""A client of servers that stream: Ropeway, llama.cpp, and those that speak as OpenAI's does."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from loadtest.errors import Unmeasurable
from loadtest.workload import Measured, Workload


class Dialect(Protocol):
    """How a server is asked for a greedy stream, and how its lines tell tokens."""

    @property
    def path(self) -> str:
        """Where it is asked."""
        ...

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """The request; greedy, and nothing ends it early."""
        ...

    def tokens(self, line: bytes, seen: int) -> int:
        """Tokens that there are after this line, of `seen` before it. Unmeasurable on an error."""
        ...


class Ropeway:
    """Ours: an event for each token."""

    path = "/generate"

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See Dialect."""
        return {
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def tokens(self, line: bytes, seen: int) -> int:
        """See Dialect."""
        if line.startswith(b"event: error"):
            raise Unmeasurable("the stream ended with an error event")
        return seen + line.startswith(b"event: token")


class Counted:
    """A server whose lines may hold several tokens each, and say how many there are by then."""

    path = ""
    count = re.compile(rb"")

    def tokens(self, line: bytes, seen: int) -> int:
        """See Dialect."""
        if b'"error"' in line:
            raise Unmeasurable(line.decode("utf-8", "replace").strip())
        match = self.count.search(line)
        return seen if match is None else max(seen, int(match[1]))


class LlamaCpp(Counted):
    """llama-server."""

    path = "/completion"
    count = re.compile(rb'"tokens_predicted":\s*(\d+)')

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See Dialect. Its prompt cache is off: every prompt is computed."""
        return {
            "prompt": list(prompt),
            "n_predict": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
            "return_tokens": True,
        }


@dataclass(frozen=True)
class OpenAI(Counted):
    """Completions as vLLM serves them, for the model of this name."""

    model: str
    path = "/v1/completions"
    count = re.compile(rb'"completion_tokens":\s*(\d+)')

    def body(self, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
        """See Dialect."""
        return {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }


ROPEWAY = Ropeway()


def session() -> aiohttp.ClientSession:
    """One without a limit of connections and without a limit of time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    dialect: Dialect,
    prompt: Sequence[int],
    max_tokens: int,
    arrived: Callable[[int], None],
) -> None:
    """One stream; arrived: called with the number of tokens that have just come.

    Raises Unmeasurable where the server refuses, fails, or sends another number of tokens.
    """
    seen = 0
    try:
        async with http.post(url + dialect.path, json=dialect.body(prompt, max_tokens)) as response:
            if response.status != 200:
                raise Unmeasurable(f"{url}: {response.status}: {await response.text()}")
            async for line in response.content:
                count = dialect.tokens(line, seen)
                if count > seen:
                    arrived(count - seen)
                    seen = count
    except aiohttp.ClientError as error:
        raise Unmeasurable(f"{url}: {error}") from error
    if seen != max_tokens:
        raise Unmeasurable(f"{url}: a stream had {seen} tokens, not {max_tokens}")


async def run_http(
    url: str, workload: Workload, repeat: int, dialect: Dialect = ROPEWAY
) -> Measured:
    """All streams over HTTP, a connection each. Raises Unmeasurable."""
    prompts = workload.prompts(repeat)
    async with session() as http:
        measured = Measured()
        await together(
            stream(http, url, dialect, prompt, workload.output_tokens, measured.of(number))
            for number, prompt in enumerate(prompts)
        )
    return measured


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All of it at once; the first failure ends the rest and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
