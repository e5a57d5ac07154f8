"""Traces of requests by OpenTelemetry: HTTP, and in it queue, prefill and decode of each stream.

Comes with the extra `otel`; nothing else imports this file before it is asked for.
"""

from __future__ import annotations

import time
from http import HTTPStatus

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.frontend.stream import Stream
from server.access.caller import PROBES, caller_of

NANO = 1_000_000_000


def otlp_provider(endpoint: str) -> TracerProvider:
    """Sends spans to an OTLP collector over HTTP, in the background."""
    provider = TracerProvider(resource=Resource.create({"service.name": "ropeway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


class Tracing:
    """A span for each request, in the trace that its `traceparent` names."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer = provider.get_tracer("ropeway")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        caller = caller_of(scope)
        context = self._propagator.extract(dict(Headers(scope=scope)))
        with self._tracer.start_as_current_span(
            f"{scope['method']} {scope['path']}", context, kind=trace.SpanKind.SERVER
        ) as span:
            span.set_attributes(
                {
                    "http.request.method": scope["method"],
                    "url.path": scope["path"],
                    "ropeway.request_id": caller.request_id,
                }
            )

            status: int = HTTPStatus.INTERNAL_SERVER_ERROR

            async def send_noted(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                    span.set_attribute("http.response.status_code", message["status"])
                await send(message)

            try:
                await self._app(scope, receive, send_noted)
            finally:
                if caller.failure is not None:
                    span.set_attribute("error.type", caller.failure)
                    if not 400 <= status < 500:  # which is no error of a server's span
                        span.set_status(trace.StatusCode.ERROR, caller.failure)
                for stream in caller.streams:
                    self._add(stream)

    def _add(self, stream: Stream) -> None:
        """Spans of what a stream has been through, as children of the running one."""
        timing, usage = stream.timing, stream.usage
        start = time.time_ns() - int((time.monotonic() - stream.submitted) * NANO)
        steps = (
            ("queue", 0.0, timing.queue),
            ("prefill", timing.queue, timing.first_token),
            ("decode", timing.first_token, timing.total),
        )
        for name, begin, end in steps:
            if begin is None or end is None:
                continue
            span = self._tracer.start_span(name, start_time=start + int(begin * NANO))
            span.set_attributes(
                {
                    "ropeway.prompt": stream.prompt,
                    "ropeway.choice": stream.choice,
                    "gen_ai.usage.input_tokens": usage.prompt_tokens,
                    "gen_ai.usage.output_tokens": usage.completion_tokens,
                    "ropeway.cached_tokens": usage.cached_tokens,
                }
            )
            span.end(start + int(max(begin, end) * NANO))
