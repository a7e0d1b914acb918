"""HTTP to one key service: a bounded body, a deadline for the whole, no redirects, no proxies, no cookies kept.

For the small exchanges of key providers; registries are `encfs.oci.http`'s. Retries are the callers'.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from encfs.errors import KeyFileError, TransportError, TransportTimeoutError
from encfs.strictjson import show_name

#: Largest answer that is read (bytes).
MAX_BODY = 1 << 20
_CONNECT_SECONDS = 10.0
_LEAST_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Address:
    """Where a key service listens: the parts of its URL. `path` has no slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the status, the headers (by `get`, without regard to case), and the whole body.

    What key services answer with holds tokens and keys.
    """

    status: int
    headers: http.client.HTTPMessage = field(repr=False)
    body: bytes = field(repr=False)


class Deadline:
    """A moment after which nothing more is tried. `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left; below zero where it has passed."""
        return self._end - time.monotonic()


def parse_address(url: str) -> Address:
    """Raises: KeyFileError where `url` is no http or https URL of host, port and path alone."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise KeyFileError(f"{show_name(url)} is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable():
        raise KeyFileError(f"{show_name(url)} is not an http or https URL")
    if parts.username is not None or parts.query or parts.fragment or " " in url:
        raise KeyFileError(f"{show_name(url)} holds more than a host, a port and a path")
    default = 443 if parts.scheme == "https" else 80
    return Address(parts.scheme, parts.hostname, port or default, parts.path.rstrip("/"))


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """TLS 1.2 and later with certificates and names checked, against `ca_file` alone where it is given.

    Raises: KeyFileError where the file is unusable.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no PEM certificates"
        raise KeyFileError(f"the CA file {ca_file} cannot be used: {reason}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


class WebClient:
    """One connection to one address, opened when first needed and used again. Close it. Not thread-safe."""

    def __init__(self, address: Address, deadline: Deadline, *, context: ssl.SSLContext | None = None) -> None:
        """`context` is for https; None: the system's authorities."""
        self.address = address
        self._deadline = deadline
        self._context = context
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = MAX_BODY,
    ) -> Answer:
        """One request to `path` below the address; whatever status comes back.

        Raises: TransportTimeoutError past the deadline; TransportError where the connection fails or the answer is
        larger than `limit` bytes or no HTTP.
        """
        left = self._deadline.left
        if left <= 0:
            raise TransportTimeoutError(f"{self.address} gave no answer in time")
        sent = {"Accept": "*/*", "User-Agent": "encfs", **(headers or {})}
        timer: threading.Timer | None = None
        try:
            connection = self._connected(left)
            # A peer that sends a byte now and then would never run into the socket's own time limit.
            timer = threading.Timer(max(self._deadline.left, _LEAST_SECONDS), _cut, (connection.sock,))
            timer.daemon = True
            timer.start()
            connection.request(method, self.address.path + path, body=body, headers=sent)
            response = connection.getresponse()
            content = self._read(response, limit)
            answer = Answer(response.status, response.headers, content)
            if response.will_close:
                self.close()
        except ssl.SSLCertVerificationError as error:
            self.close()
            raise TransportError(
                f"the certificate of {self.address} is refused: {error.verify_message}",
                hint="give the authority that issued it (ca=FILE)",
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            if self._deadline.left <= 0 or isinstance(error, TimeoutError):
                raise TransportTimeoutError(f"{self.address} gave no answer in time") from None
            raise TransportError(f"{self.address} cannot be reached: {_reason(error)}") from None
        except BaseException:
            self.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
                # It would keep a mount from going to the background, and might cut what this connection carries next.
                timer.join()
        return answer

    def _read(self, response: http.client.HTTPResponse, limit: int) -> bytes:
        content = response.read(limit + 1)
        if len(content) > limit:
            raise TransportError(f"{self.address} answers with more than {limit} bytes")
        # What is still to come: read() takes an early end for the end, and headers end with the connection, too.
        if response.length:
            raise http.client.IncompleteRead(content, response.length)
        if self._deadline.left <= 0:
            raise TransportTimeoutError(f"{self.address} gave no answer in time")
        return content

    def _connected(self, left: float) -> http.client.HTTPConnection:
        if self._connection is None:
            timeout = min(left, _CONNECT_SECONDS)
            where = (self.address.host, self.address.port)
            if self.address.scheme == "https":
                context = self._context or tls_context(None)
                self._connection = http.client.HTTPSConnection(*where, timeout=timeout, context=context)
            else:
                self._connection = http.client.HTTPConnection(*where, timeout=timeout)
            self._connection.connect()
        if self._connection.sock is not None:
            self._connection.sock.settimeout(max(left, _LEAST_SECONDS))
        else:
            # It was closed by the peer's wish; http.client connects anew.
            self._connection.timeout = min(left, _CONNECT_SECONDS)
            self._connection.connect()
        return self._connection


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed already


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason or 'no reason given'})"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"no HTTP answer ({type(error).__name__})"
