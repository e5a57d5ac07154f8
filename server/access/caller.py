"""Who asks, and what became of it: for the log, and for traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from engine.frontend.stream import Stream
from server.access.keys import ApiKey

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by programs that watch the server: not worth a line or a trace."""


@dataclass
class Caller:
    """One HTTP request.

    request_id: theirs or ours; key: None where none are needed; streams: what it started; failure:
    the code of the error that it ended by; prompts: what was asked, where that is to be logged.
    """

    request_id: str
    key: ApiKey | None = None
    streams: Sequence[Stream] = ()
    failure: str | None = None
    prompts: list[str | list[int]] = field(default_factory=list)


def note_failure(scope: Scope, code: str) -> None:
    """Keep the code of an error for the log, where there is one for this request."""
    caller = scope.get("state", {}).get("caller")
    if isinstance(caller, Caller):
        caller.failure = code


def caller_of(scope: Scope) -> Caller:
    """Of a request that RequestIds has let through."""
    caller = scope["state"]["caller"]
    assert isinstance(caller, Caller)
    return caller
