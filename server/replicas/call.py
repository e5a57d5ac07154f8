"""A request and its answer on their way between gateway and replica."""

from __future__ import annotations

import json
import random
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from server.replicas.affinity import prefix_keys

SEED_BITS = 53
"""Of seeds that the gateway draws: exact in every JSON parser."""

LEAST_TIMEOUT = 0.001


@dataclass(frozen=True)
class Call:
    """An HTTP request on its way to a replica; keys: of its prompt's beginnings."""

    method: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    keys: tuple[bytes, ...] = ()

    @property
    def scope(self) -> MutableMapping[str, Any]:
        """As ASGI has it."""
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": self.headers,
            "client": None,
            "server": None,
        }


@dataclass(frozen=True)
class Head:
    """How an answer begins."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    @property
    def kept(self) -> dict[str, str]:
        """Headers for the client; the length is set again."""
        pairs = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers)
        return {name: value for name, value in pairs if name != "content-length"}

    @property
    def streams(self) -> bool:
        """Whether server-sent events follow."""
        return self.kept.get("content-type", "").startswith("text/event-stream")


def prepared(call: Call) -> Call:
    """A request for tokens with a seed, so that it can be asked again, and its prompt's keys.

    What is no such request is left alone: the replica says what is wrong with it.
    """
    fields = _fields(call)
    if fields is None:
        return call
    if fields.get("seed") is None:
        fields["seed"] = random.getrandbits(SEED_BITS)
    keys: tuple[bytes, ...] = ()
    match fields.get("prompt"):
        case str() as text:
            keys = prefix_keys(text)
        case list() as ids if all(isinstance(each, int) for each in ids):
            keys = prefix_keys(ids)
    return replace(_with(call, fields), keys=keys)


def timed(call: Call, elapsed: float) -> Call:
    """The request once more, `elapsed` seconds later: they count into its timeout_s."""
    fields = _fields(call)
    if fields is None or not isinstance(fields.get("timeout_s"), int | float):
        return call
    return _with(call, fields | {"timeout_s": max(fields["timeout_s"] - elapsed, LEAST_TIMEOUT)})


def _fields(call: Call) -> dict[str, Any] | None:
    if call.method != "POST" or call.path != "/generate":
        return None
    try:
        fields = json.loads(call.body)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _with(call: Call, fields: dict[str, Any]) -> Call:
    body = json.dumps(fields).encode()
    headers = [each for each in call.headers if each[0] != b"content-length"]
    length = (b"content-length", str(len(body)).encode())
    return replace(call, body=body, headers=(*headers, length))
