"""What a peer is, offline and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from loadtest.client import Dialect
from loadtest.servers import Server
from loadtest.workload import Workload

Peer = TypeVar("Peer")


@dataclass(frozen=True)
class Rates:
    """Of one offline run. tokens_per_s: prompts included; decode: after the prompts, if known."""

    tokens_per_s: float
    decode_tokens_per_s: float | None


class Offline(Protocol):
    """An engine without HTTP."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...

    def run(self, workload: Workload, repeat: int) -> Rates:
        """All streams of the workload, greedy, to their last token."""
        ...

    def prefill(self, tokens: int, repeat: int) -> float | None:
        """Prompt tokens a second of one prompt; None where that cannot be told apart."""
        ...


@dataclass(frozen=True)
class Reached:
    """A server that runs, and how it is spoken to."""

    server: Server
    dialect: Dialect


class Serving(Protocol):
    """An engine that serves HTTP."""

    @property
    def name(self) -> str:
        """As the table shows it."""
        ...

    def serve(self) -> AbstractContextManager[Reached]:
        """Start it, and end it afterwards."""
        ...


@dataclass(frozen=True)
class Absent:
    """A peer that is not there, and what would bring it."""

    name: str
    why: str


def rotated(peers: Sequence[Peer], by: int) -> Iterator[Peer]:
    """All of them, another one first each time."""
    for at in range(len(peers)):
        yield peers[(at + by) % len(peers)]
