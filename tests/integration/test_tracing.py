"""Traces: what is in a span and what never is, in memory, and from a real mount to a collector over HTTP."""

from __future__ import annotations

import gzip
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from encfs import tracing
from encfs.errors import NotFoundError
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.oci.registry import Registry
from tests.support.artifacts import encrypt_tree, make_keys
from tests.support.mounts import detach_all
from tests.support.waiting import LONG, wait_until

_ENCFS = Path(sys.executable).parent / "encfs"
_SECRET_NAME = "project-bluebird.bin"


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> tracing._State:
    state = tracing._State(wanted=True, slow_read=0.5)
    monkeypatch.setattr(tracing, "_state", state)
    return state


def test_spans_in_memory(state: tracing._State) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with tracing.span("artifact.open") as traced:  # kept until the SDK is there
        traced["encfs.volumes"] = 2
    assert len(state.kept) == 1
    tracing.begin(provider)
    with pytest.raises(NotFoundError), tracing.span("key.release"):
        raise NotFoundError("a text that names /secret/things")
    tracing.note_read(0.1, 1)
    tracing.note_read(2.0, 4096)
    opened, key, read = exporter.get_finished_spans()
    assert (opened.name, dict(opened.attributes or {})) == ("artifact.open", {"encfs.volumes": 2})
    assert (key.name, dict(key.attributes or {})) == ("key.release", {"error.type": "NotFoundError"})
    assert not key.status.is_ok
    assert not any("secret" in one.to_json() for one in (opened, key, read))
    assert (read.name, dict(read.attributes or {})) == ("read", {"encfs.read.size": 4096})
    assert read.start_time is not None
    assert read.end_time is not None
    assert read.end_time - read.start_time == 2_000_000_000
    tracing.finish()


def test_requests_to_registries(state: tracing._State) -> None:
    with Collector([]) as port:
        reference = parse_reference(f"docker://127.0.0.1:{port}/acme/chat:v1")
        registry = Registry(reference, StoreOptions(plain_http=True))
        with closing(registry), pytest.raises(NotFoundError):
            registry.document()
    [record] = state.kept
    assert (record.name, record.error) == ("registry.request", "")
    assert dict(record.attributes) == {
        "http.request.method": "GET",
        "server.address": f"127.0.0.1:{port}",
        "http.response.status_code": 404,
    }


def test_kept_spans_have_an_end(state: tracing._State) -> None:
    for _ in range(2000):
        tracing.note_read(1.0, 1)
    assert len(state.kept) == 512


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    state = tracing._State()
    monkeypatch.setattr(tracing, "_state", state)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tracing.span("artifact.open"):
        pass
    tracing.note_read(100.0, 1)
    assert not state.kept


class Collector:
    """What takes OTLP over HTTP on a free port, and everything else for not found. `bodies` gets what was sent."""

    def __init__(self, bodies: list[bytes]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> int:
        self._thread.start()
        return self._server.server_address[1]

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    keys = make_keys(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / _SECRET_NAME).write_bytes(os.urandom(1 << 20))
    with closing(Layout(tmp_path / "store", create=True)) as store:
        encrypt_tree(tmp_path / "model", store, keys)
    (tmp_path / "mount").mkdir()
    yield tmp_path
    detach_all(tmp_path / "mount")


def _mount_and_read(base: Path, port: int, sent: Callable[[], object]) -> float:
    """Mount in the background, read, unmount once something was `sent`; seconds that reading took."""
    environment = {
        **os.environ,
        "ENCFS_RUNTIME_DIR": str(base / "run"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "600",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "ENCFS_TRACE_SLOW_READ": "0",
    }
    words = ("mount", f"oci:{base}/store:v1", base / "mount", "-k", base / "recipient.jwk", "--allow-unsigned")
    subprocess.run([_ENCFS, *words], env=environment, check=True, capture_output=True, timeout=60)
    log = next((base / "run").glob("*.log"))
    started = time.monotonic()
    assert (base / "mount" / _SECRET_NAME).read_bytes() == (base / "model" / _SECRET_NAME).read_bytes()
    seconds = time.monotonic() - started
    wait_until(sent, log.read_text)  # the SDK is loaded beside the mount
    assert "OpenTelemetry is not installed" not in log.read_text()
    subprocess.run([_ENCFS, "umount", base / "mount"], env=environment, check=True, capture_output=True, timeout=60)
    return seconds


@pytest.mark.fuse
@pytest.mark.root
def test_a_mount_and_its_collector(base: Path) -> None:
    bodies: list[bytes] = []
    with Collector(bodies) as port:
        _mount_and_read(base, port, lambda: b"read" in b"".join(bodies))
    spans, resources = {}, {}
    for body in bodies:
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resources.update({one.key: one.value.string_value for one in group.resource.attributes})
            for scope in group.scope_spans:
                spans.update({one.name: {item.key for item in one.attributes} for one in scope.spans})
    assert spans["artifact.open"] == {"encfs.volumes"}
    assert spans["key.release"] == {"encfs.key.provider"}
    assert spans["read"] == {"encfs.read.size"}
    assert resources["service.name"] == "encfs"
    assert resources["encfs.content_digest"].startswith("sha256:")
    everything = b"".join(bodies)
    assert _SECRET_NAME.encode() not in everything
    assert b"recipient.jwk" not in everything


@pytest.mark.fuse
@pytest.mark.root
def test_a_collector_that_hangs_keeps_nobody(base: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        seconds = _mount_and_read(base, silent.getsockname()[1], lambda: select.select([silent], [], [], 0)[0])
    assert seconds < LONG
