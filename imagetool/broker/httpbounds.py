"""Bounds of connections that uvicorn itself does not have: times and sizes of requests, connections of one address."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from encfs.kbs.protocol import MAX_MESSAGE
from imagetool.broker.limits import network

#: Seconds for a TLS handshake.
HANDSHAKE_TIMEOUT = 10.0
#: Bytes of the request line and all headers.
MAX_HEAD = 16 << 10
#: Seconds from the connection, or from the first byte of a further request, to the end of the headers.
HEAD_TIMEOUT = 10.0
#: Bytes of a whole request, with what chunks and trailers take.
MAX_REQUEST = MAX_HEAD + 2 * MAX_MESSAGE
#: Seconds from the end of the headers to that of the request; whoever waits for the body gives up before.
REST_TIMEOUT = 15.0


class Loop(uvloop.Loop):
    """An event loop whose servers have a deadline for TLS handshakes; uvicorn passes none on."""

    async def create_server(self, *arguments: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = HANDSHAKE_TIMEOUT
        return await super().create_server(*arguments, **options)


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 with a deadline and a bound for the head of each request and for the whole of it."""

    #: Connections of one address, and how many there may be.
    _open: Counter[str]
    _most: int

    _deadline: asyncio.TimerHandle | None = None
    _address = ""
    _received = _bound = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast(asyncio.Transport, _WholeAnswers(transport)))
        self._address = network(self.client[0]) if self.client else ""
        self._open[self._address] += 1
        if self._open[self._address] > self._most:
            transport.abort()
        self._await(HEAD_TIMEOUT, MAX_HEAD)
        self._received = 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._open[self._address] -= 1
        if not self._open[self._address]:
            del self._open[self._address]
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._deadline is not None and self._received > self._bound and not self.transport.is_closing():
            if self._bound == MAX_HEAD:
                self.send_400_response("The request's head is too large.")
            else:  # an answer was given already; closing TLS in order would go on reading
                self.transport.abort()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._deadline is None:
            self._received = 0
            self._await(HEAD_TIMEOUT, MAX_HEAD)

    def on_headers_complete(self) -> None:
        self._await(REST_TIMEOUT, MAX_REQUEST)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        cast(_WholeAnswers, self.transport).flush()
        super().on_response_complete()

    def on_message_complete(self) -> None:
        self._arrived()
        super().on_message_complete()

    def _await(self, seconds: float, size: int) -> None:
        self._arrived()
        self._bound = size
        self._deadline = self.loop.call_later(seconds, self._too_late)

    def _arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        self.transport.abort()


class _WholeAnswers:
    """A transport that sends the head of an answer together with its body.

    uvicorn writes them one after the other: two records of TLS, two packets, and a client that wakes up for the first.
    """

    def __init__(self, transport: Any) -> None:
        self._transport, self._head = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head or not _is_head(data):
            self._transport.write(self._head + data)
            self._head = b""
        else:
            self._head = data

    def flush(self) -> None:
        """Send what waits: nothing comes behind the head of an answer to HEAD, or of one whose body failed."""
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def close(self) -> None:
        self.flush()
        self._transport.close()


def _is_head(data: bytes) -> bool:
    """Whether an answer goes on behind it: the first of the two writes, and no `100 Continue`."""
    return data.endswith(b"\r\n\r\n") and not data.startswith(b"HTTP/1.1 100 ")


def bounded_protocol(connections: int) -> type[BoundedProtocol]:
    """The protocol for one process, in which one address has so many connections at most."""
    return type("BoundedProtocol", (BoundedProtocol,), {"_open": Counter(), "_most": connections})
