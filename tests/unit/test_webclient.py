"""HTTP to key services whose server, or whoever is in between, misbehaves: an error of one line, in time."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from encfs.errors import TransportError, TransportTimeoutError
from encfs.webclient import Address, Answer, Deadline, WebClient


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A server for one connection, which answers the first request as `answer` does, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                try:
                    answer(connection)
                except OSError:
                    return  # the client had enough

        thread = threading.Thread(target=run)
        thread.start()
        yield Address("http", "127.0.0.1", listener.getsockname()[1], "")
        thread.join()


def body(content: bytes) -> bytes:
    with (
        serving(lambda connection: connection.sendall(content)) as address,
        WebClient(address, Deadline(5)) as client,
    ):
        return client.exchange("GET", "/", limit=64).body


def test_an_answer() -> None:
    assert body(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc") == b"abc"
    assert body(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n") == b"abc"
    assert body(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc") == b"abc"


@pytest.mark.parametrize(
    "content",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n" + bytes(32),  # a key with something behind it, cut to a key
        b"HTTP/1.1 200 OK\r\nContent-Length: 33\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n" + bytes(32),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n" + bytes(32) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 65\r\n\r\n" + bytes(65),
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(65),
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + bytes(100_000),
        b"",
        b"SSH-2.0-x\r\n",
    ],
)
def test_answers_that_are_cut_short_or_too_large(content: bytes) -> None:
    with pytest.raises(TransportError):
        body(content)


def test_redirects_are_not_followed() -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"
    with serving(lambda connection: connection.sendall(answer)) as address, WebClient(address, Deadline(5)) as client:
        assert client.exchange("GET", "/").status == 302


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(start: bytes) -> None:
    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    with serving(drip) as address, WebClient(address, Deadline(0.5)) as client:
        began = time.monotonic()
        with pytest.raises(TransportTimeoutError):
            client.exchange("GET", "/")
        assert time.monotonic() - began < 60


def test_no_thread_is_left_once_an_answer_is_there() -> None:
    """A mount goes to the background right after its key has come: a process with threads could not be forked."""

    def answer_twice(connection: socket.socket) -> None:
        for _ in range(2):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            connection.recv(65536)

    for _ in range(50):
        with serving(answer_twice) as address, WebClient(address, Deadline(5)) as client:
            for _ in range(2):
                client.exchange("GET", "/")
                assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_an_answer_is_in_no_repr() -> None:
    headers = http.client.HTTPMessage()
    headers["Set-Cookie"] = "session=secret"
    assert "secret" not in repr(Answer(200, headers, b"secret"))
