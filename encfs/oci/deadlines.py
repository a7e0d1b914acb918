"""Connections whose answers have an end: a time limit for each step of an answer, not only for single packets.

By itself a socket's time limit starts anew with every packet: who drips the headers, the size of a chunk or interim
answers keeps a client waiting for ever. Here, the status and all headers, and each piece of the body, take at most that
time.
Not here: how long the whole may take (`http.read_chunks`).
"""

from __future__ import annotations

import io
import math
import socket
import time
from http.client import HTTPResponse
from typing import Any

import urllib3
import urllib3.connection


class _Reader(io.RawIOBase):
    """What arrives on a connection, until `deadline` (monotonic seconds)."""

    def __init__(self, stream: io.RawIOBase) -> None:
        super().__init__()
        self._stream = stream
        self.deadline = math.inf

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Raises: TimeoutError."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the answer takes too long")
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Response(HTTPResponse):
    """An answer whose every step takes at most the socket's time limit."""

    def __init__(self, sock: socket.socket, *args: Any, **named: Any) -> None:
        super().__init__(sock, *args, **named)
        self._seconds = sock.gettimeout()
        stream = self.fp.detach()  # it is a BufferedReader
        self._reader = _Reader(stream)
        self.fp = io.BufferedReader(self._reader)

    def begin(self) -> None:
        """Read the status and headers."""
        self._start()
        super().begin()

    def read1(self, n: int = -1) -> bytes:
        """Read what is there of the body, waiting for something."""
        self._start()
        return super().read1(n)

    def _start(self) -> None:
        self._reader.deadline = math.inf if self._seconds is None else time.monotonic() + self._seconds


class _PlainConnection(urllib3.connection.HTTPConnection):
    response_class = _Response


class _SecureConnection(urllib3.connection.HTTPSConnection):
    response_class = _Response


class _PlainPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _SecurePool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


#: For urllib3's pool managers.
POOLS = {"http": _PlainPool, "https": _SecurePool}
