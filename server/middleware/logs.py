"""The log: one line for each event, as text or as JSON. Prompts are in it only where asked for."""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access.caller import PROBES, Caller, caller_of
from server.settings import LogFormat, LogLevel

FIELDS = "fields"
"""Where a record carries what a program may want to read."""

access_logger = logging.getLogger("ropeway.access")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in UTC, level, logger, message; the record's fields; a traceback as text."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """Time, level, message, and the record's fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802, its name in logging
        """The line without its traceback."""
        fields = getattr(record, FIELDS, {})
        said = "".join(f" {name}={json.dumps(value)}" for name, value in fields.items())
        return super().formatMessage(record) + said


def configure(log_format: LogFormat, level: LogLevel) -> None:
    """Send this process's log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("ropeway").setLevel(level.upper())


class AccessLog:
    """Logs each request but probes when it is over, at level info."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        logged = scope["type"] == "http" and scope["path"] not in PROBES
        if not logged or not access_logger.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        status = 500  # where nothing is sent, the server answers so
        began = time.monotonic()

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            seconds = round(time.monotonic() - began, 6)
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": seconds,
                **summary(caller_of(scope)),
            }
            access_logger.info("request", extra={FIELDS: fields})


def summary(caller: Caller) -> dict[str, Any]:
    """What is known of a request; never its prompts, unless the server was told to keep them."""
    fields: dict[str, Any] = {"request_id": caller.request_id}
    if caller.key is not None:
        fields["key"] = caller.key.name
    if caller.failure is not None:
        fields["error"] = caller.failure
    if caller.streams:
        usages = [stream.usage for stream in caller.streams]
        first = caller.streams[0].timing
        fields |= {
            "finish_reason": [stream.finish_reason for stream in caller.streams],
            "prompt_tokens": [usage.prompt_tokens for usage in usages],
            "completion_tokens": [usage.completion_tokens for usage in usages],
            "cached_tokens": [usage.cached_tokens for usage in usages],
            "queue_s": first.queue,
            "first_token_s": first.first_token,
        }
    if caller.prompts:
        fields["prompts"] = caller.prompts
    return fields
