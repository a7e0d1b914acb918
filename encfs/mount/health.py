"""`--listen`: /healthz, /readyz and /metrics over HTTP, on the loopback address or a unix socket.

As little of HTTP/1.1 (RFC 9112) as a probe needs: GET and HEAD, no bodies, one exchange a connection; every size and
wait is bounded. Not here: what is shown (`metrics`).
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from encfs.errors import MountError, UsageError
from encfs.mount.control import accept

#: Seconds for one exchange, connections at the same time, bytes of a request's head.
_PATIENCE = 5.0
_CONNECTIONS = 16
_MAX_HEAD = 8192
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_UNIX = "unix:"

log = logging.getLogger("encfs.mount")


@dataclass(frozen=True, slots=True)
class Probes:
    """What is asked of a mount: whether it is ready, and its metrics."""

    ready: Callable[[], bool]
    metrics: Callable[[], str]


def listen_at(address: str) -> socket.socket:
    """A listening socket for `IP:PORT` (loopback only) or `unix:PATH`. Raises: UsageError, MountError."""
    try:
        if address.startswith(_UNIX):
            return _listen_unix(Path(address.removeprefix(_UNIX)))
        place, port = _parse(address)
        family = socket.AF_INET6 if place.version == 6 else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((str(place), port))
        server.listen()
    except OSError as error:
        raise MountError(f"cannot listen at {address}: {error.strerror}") from None
    return server


def _parse(address: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    host, _, port = address.rpartition(":")
    try:
        place, number = ipaddress.ip_address(host.strip("[]")), int(port)
    except ValueError:
        place, number = ipaddress.ip_address("0.0.0.0"), -1  # noqa: S104 - refused below
    if not place.is_loopback or not 0 <= number < 65536:
        raise UsageError(
            f"--listen {address!r} is neither a loopback address with a port nor a socket",
            hint="write 127.0.0.1:9469, [::1]:9469 or unix:PATH",
        )
    return place, number


def _listen_unix(path: Path) -> socket.socket:
    if path.is_socket():
        path.unlink()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    server.bind(os.fspath(path))
    server.listen()
    return server


async def serve(server: socket.socket, probes: Probes) -> None:
    """Answer until cancelled. Owns `server`, and the file of a unix socket."""
    limit = trio.Semaphore(_CONNECTIONS)
    server.setblocking(False)
    with _removed(server), trio.socket.from_stdlib_socket(server) as listener:
        async with trio.open_nursery() as nursery:
            while True:
                await limit.acquire()
                connection = await accept(listener)
                nursery.start_soon(_exchange, connection, probes, limit)


@contextmanager
def _removed(server: socket.socket) -> Iterator[None]:
    """At the end, remove the file of a unix socket."""
    name = server.getsockname() if server.family == socket.AF_UNIX else None
    try:
        yield
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)


def discard(server: socket.socket) -> None:
    """The same for one that was never served. Harmless where it was."""
    if server.fileno() >= 0:
        with _removed(server):
            server.close()


async def _exchange(connection: trio.socket.SocketType, probes: Probes, limit: trio.Semaphore) -> None:
    try:
        with connection, trio.move_on_after(_PATIENCE):
            head = b""
            while b"\r\n\r\n" not in head and len(head) < _MAX_HEAD:
                piece = await connection.recv(_MAX_HEAD - len(head))
                if not piece:
                    return
                head += piece
            answer = respond(head, probes)
            while answer:
                answer = answer[await connection.send(answer) :]
    except OSError as error:
        log.debug("health: %s", error)
    finally:
        limit.release()


def respond(head: bytes, probes: Probes) -> bytes:
    """The whole response to a request's head."""
    words = head.partition(b"\r\n")[0].split(b" ")
    kind = _TEXT
    if b"\r\n\r\n" not in head or len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        status, body = "400 Bad Request", "bad request\n"
    elif words[0] not in {b"GET", b"HEAD"}:
        status, body = "405 Method Not Allowed", "only GET and HEAD\n"
    else:
        match words[1].partition(b"?")[0]:
            case b"/healthz":
                status, body = "200 OK", "ok\n"
            case b"/readyz":
                status, body = ("200 OK", "ready\n") if probes.ready() else ("503 Service Unavailable", "not ready\n")
            case b"/metrics":
                status, body, kind = "200 OK", probes.metrics(), _METRICS
            case _:
                status, body = "404 Not Found", "there are /healthz, /readyz and /metrics\n"
    data = body.encode()
    fields = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    return fields.encode() + (b"" if words[0] == b"HEAD" else data)
