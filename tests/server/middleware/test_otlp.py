"""Traces as a collector gets them: protobuf over HTTP, from `ropeway serve` itself."""

from __future__ import annotations

import gzip
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.patience import PATIENCE
from tests.server.processes.test_serve import serve

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Collector:
    """What came to POST /v1/traces. services: of each message."""

    url: str
    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A receiver of the OpenTelemetry protocol, by its published message types."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                content = gzip.decompress(content)
            assert self.path == "/v1/traces"
            assert self.headers["Content-Type"] == "application/x-protobuf"
            for each in ExportTraceServiceRequest.FromString(content).resource_spans:
                collector.services.add(attributes(each.resource.attributes)["service.name"])
                for scope in each.scope_spans:
                    collector.spans += scope.spans
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def attributes(values: list[KeyValue]) -> dict[str, str | int]:
    return {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in values}


def test_a_collector_gets_every_span_under_its_parent(tiny_model_dir: Path) -> None:
    body = {"prompt": "the a", "max_tokens": 5, "ignore_eos": True, "n": 2}
    with (
        collecting() as collector,
        serve(tiny_model_dir, "--otlp-endpoint", collector.url) as server,
    ):
        answer = httpx.post(
            f"{server.url}/generate",
            json=body,
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "mine"},
            trust_env=False,
            timeout=PATIENCE,
        )
        assert answer.text.rstrip().split("\n")[-2] == "event: done"
        refused = httpx.post(
            f"{server.url}/generate", json={"prompt": ""}, trust_env=False, timeout=PATIENCE
        )
        assert refused.status_code == 422
        httpx.get(f"{server.url}/health", trust_env=False, timeout=PATIENCE)
        server.process.send_signal(signal.SIGTERM)
        status, errors = server.end()  # what was not sent yet is
        assert status == 0, errors
    assert collector.services == {"ropeway"}
    root, other = (span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER)
    if root.trace_id.hex() != TRACE:
        root, other = other, root
    assert (root.name, root.parent_span_id.hex()) == ("POST /generate", PARENT)
    assert attributes(root.attributes)["ropeway.request_id"] == "mine"
    assert attributes(root.attributes)["http.response.status_code"] == 200
    assert attributes(other.attributes)["http.response.status_code"] == 422
    assert attributes(other.attributes)["error.type"] == "invalid_request"
    assert other.trace_id.hex() != TRACE
    assert other.parent_span_id == b""
    failed = [span for span in collector.spans if span.status.code != Status.STATUS_CODE_UNSET]
    assert failed == []
    children = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert len(children) == len(collector.spans) - 2 == 6
    assert len({span.span_id for span in collector.spans}) == 8
    for choice in range(2):
        queue, prefill, decode = (
            span
            for span in sorted(children, key=lambda span: span.start_time_unix_nano)
            if attributes(span.attributes)["ropeway.choice"] == choice
        )
        assert [span.name for span in (queue, prefill, decode)] == ["queue", "prefill", "decode"]
        assert {span.trace_id.hex() for span in (queue, prefill, decode)} == {TRACE}
        assert attributes(decode.attributes)["gen_ai.usage.output_tokens"] == 5
        assert root.start_time_unix_nano <= queue.start_time_unix_nano
        assert queue.end_time_unix_nano == prefill.start_time_unix_nano
        assert prefill.end_time_unix_nano == decode.start_time_unix_nano
        assert decode.start_time_unix_nano < decode.end_time_unix_nano
        assert decode.end_time_unix_nano <= root.end_time_unix_nano
