"""What an HTTP process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of the server.

    max_queue: requests that may wait beyond those that run; num_workers: HTTP processes, of which
    each takes its share of both; max_body_bytes: of a request's body;
    keep_alive_seconds: silence after which a waiting stream gets a comment, so that no proxy takes
    it for dead; drain_seconds: how long running streams may go on once the server is told to stop;
    max_restarts: how often in a row the engine process is started again when it dies.
    """

    max_queue: int = 1024
    num_workers: int = 1
    max_body_bytes: int = 1 << 20
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 30.0
    max_restarts: int = 5
