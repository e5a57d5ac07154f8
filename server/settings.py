"""What an HTTP process is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["info", "warning"]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of the server.

    max_queue: requests that may wait beyond those that run; num_workers: HTTP processes, of which
    each takes its share of both; max_body_bytes: of a request's body;
    keep_alive_seconds: silence after which a waiting stream gets a comment, so that no proxy takes
    it for dead; drain_seconds: how long running streams may go on once the server is told to stop;
    max_restarts: how often in a row the engine process is started again when it dies;
    api_key_file: whose keys are let in, None: anybody; share_prefix_cache: among all keys;
    cors_origins: of pages that may ask; ssl_certfile, ssl_keyfile: for HTTPS; worker: which of the
    HTTP processes this is, from 0; shared_dir: a folder that they share, None where it is alone;
    log_format, log_level: info logs every request; log_prompts: with what was asked; otlp_endpoint:
    where OpenTelemetry spans are sent, a URL; resume_window: seconds that a stream waits for a
    client that was lost, 0: it is aborted.
    """

    max_queue: int = 1024
    num_workers: int = 1
    max_body_bytes: int = 1 << 20
    keep_alive_seconds: float = 15.0
    drain_seconds: float = 30.0
    max_restarts: int = 5
    api_key_file: str | None = None
    share_prefix_cache: bool = False
    cors_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    worker: int = 0
    shared_dir: str | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "warning"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    resume_window: float = 0.0
