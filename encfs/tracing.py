"""OpenTelemetry traces of a mount, where the environment asks for them: opening, keys, registry requests, slow reads.

Spans are plain records until `start`, which a daemon calls once it serves, in a thread: the SDK takes a while to load,
and needs threads, with which no process can go to the background. From then on they go to the SDK's own queue, which
drops what does not fit. So nothing that is traced ever waits for the collector. A span says how long something took,
how large it was and how it ended; never a name out of an artifact, a key, a header, a path of a URL or the text of an
error. Not here: counters (`encfs.mount.metrics`), what is written down of each mount (`encfs.audit`).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

Value = str | int | float | bool

#: Spans that are kept until `start`; the first ones tell how the mount was opened, later ones are dropped.
_KEPT = 512
#: Seconds that the last spans get when a daemon ends.
_PATIENCE = 2.0
#: Seconds from which on a read has a span, and the variable that sets another threshold.
_SLOW_READ, _SLOW_READ_VARIABLE = 1.0, "ENCFS_TRACE_SLOW_READ"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

log = logging.getLogger("encfs.tracing")


@dataclass(frozen=True, slots=True)
class _Record:
    """A span that has ended; times in nanoseconds since the epoch. `error` is the type of what ended it."""

    name: str
    started: int
    ended: int
    attributes: Mapping[str, Value]
    error: str


@dataclass(slots=True)
class _State:
    wanted: bool | None = None
    slow_read: float = _SLOW_READ
    kept: deque[_Record] = field(default_factory=deque)
    provider: TracerProvider | None = None
    tracer: Tracer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_state = _State()


def is_wanted() -> bool:
    """Whether the environment names a collector (OpenTelemetry's environment variable specification). Read once."""
    if _state.wanted is None:
        environment = os.environ
        off = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
        other = environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
        _state.wanted = not off and not other and any(environment.get(name) for name in _ENDPOINTS)
        try:
            _state.slow_read = float(environment.get(_SLOW_READ_VARIABLE, _SLOW_READ))
        except ValueError:
            log.warning("%s is no number of seconds: %g is taken", _SLOW_READ_VARIABLE, _SLOW_READ)
    return _state.wanted


@contextmanager
def span(name: str, **attributes: Value) -> Iterator[dict[str, Value]]:
    """Trace what happens in here; what is known of it only later goes into what this gives. Nothing where it is off."""
    if not is_wanted():
        yield {}
        return
    started, error = time.time_ns(), ""
    try:
        yield attributes
    except BaseException as raised:
        error = type(raised).__name__
        raise
    finally:
        _emit(_Record(name, started, time.time_ns(), attributes, error))


def note_read(seconds: float, size: int) -> None:
    """A read of `size` bytes has taken so long; has a span if that was long. For the event loop: it never waits."""
    if _state.wanted and seconds >= _state.slow_read:
        ended = time.time_ns()
        _emit(_Record("read", ended - int(seconds * 1e9), ended, {"encfs.read.size": size}, ""))


def _emit(record: _Record) -> None:
    tracer = _state.tracer
    if tracer is not None:
        _give(tracer, record)
    elif len(_state.kept) < _KEPT:
        _state.kept.append(record)


def _give(tracer: Tracer, record: _Record) -> None:
    from opentelemetry.trace import Status, StatusCode

    one = tracer.start_span(record.name, start_time=record.started, attributes=record.attributes)
    if record.error:
        one.set_attribute("error.type", record.error)
        one.set_status(Status(StatusCode.ERROR))
    one.end(record.ended)


def start(mount: Mapping[str, Value]) -> None:
    """Load the SDK, and send what was kept; `mount` describes the process. May take a second: not on the event loop."""
    if not is_wanted():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("traces are asked for, and OpenTelemetry is not installed: pip install 'encfs[otel]'")
        _state.wanted = False
        return
    resource = Resource.create({"service.name": "encfs", "service.version": _release(), **mount})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    begin(provider)


def begin(provider: TracerProvider) -> None:
    """Send spans through `provider`, those first that were kept."""
    with _state.lock:
        tracer = provider.get_tracer("encfs", _release())
        while _state.kept:
            _give(tracer, _state.kept.popleft())
        _state.provider, _state.tracer = provider, tracer


def _release() -> str:
    from importlib.metadata import version

    return version("encfs")


def finish() -> None:
    """Let the last spans out, in bounded time: the collector may be gone."""
    provider, _state.tracer, _state.provider = _state.provider, None, None
    if provider is None:
        return
    ending = threading.Thread(target=provider.shutdown, name="encfs-traces", daemon=True)
    ending.start()
    ending.join(_PATIENCE)
