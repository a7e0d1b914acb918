"""One blob of a registry: ranges of it, resumed after a cut, checked against what the registry says it sends.

The bytes are untrusted; only their place and number are checked here. A registry without Range requests sends the
blob from its start: then more pieces come than were asked for, so that a cache may keep them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from encfs.errors import EncfsError, IntegrityError, TransportError
from encfs.oci.blobs import Blob, Descriptor
from encfs.oci.client import Client
from encfs.oci.http import TRANSIENT, content_length, named_error, read_chunks
from encfs.oci.retry import Patience

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)", re.ASCII)
_RANGE_STATUSES = frozenset({200, 206, 416})
#: Bytes that have to arrive within the time allowed. Less buys no more time: who drips would keep a reader for ever.
_LEAST_PROGRESS = 128 << 10
#: Seconds for which the address that a registry redirected to is asked directly; such addresses are signed for minutes.
_DIRECT_SECONDS = 60.0


class RangeBlob(Blob, Protocol):
    """A blob whose bytes arrive in pieces."""

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) that together cover the range asked for, in any order and maybe with more around it.

        Raises: TransportError, NotFoundError, IntegrityError.
        """


def fill(pieces: Iterator[tuple[int, bytes]], offset: int, buffer: memoryview) -> None:
    """Copy those parts of the pieces that fall into `buffer`, which begins at `offset`."""
    end = offset + len(buffer)
    for position, chunk in pieces:
        first, last = max(position, offset), min(position + len(chunk), end)
        if first < last:
            buffer[first - offset : last - offset] = memoryview(chunk)[first - position : last - position]


class RemoteBlob:
    """Random access to one blob by Range requests. Thread-safe."""

    def __init__(self, client: Client, descriptor: Descriptor) -> None:
        self.size = descriptor.size
        self._client = client
        self._name = f"{client.registry}/{client.repository}@{descriptor.digest}"
        self._url = client.url("blobs", descriptor.digest)
        self._direct = ("", 0.0)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises: TransportError, NotFoundError, IntegrityError where the blob is shorter than it claims."""
        self._check(offset, len(buffer))
        if buffer:
            fill(self.pieces(offset, len(buffer)), offset, buffer)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Nothing of a registry is ever at hand."""
        return not buffer

    def discard(self, offset: int, size: int) -> bool:
        """There is no local copy; what arrived wrong may arrive right the next time."""
        return True

    def close(self) -> None:
        """The connections belong to the client."""

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or offset + size > self.size:
            raise IntegrityError(f"{self._name} is shorter than it claims")

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """As `RangeBlob.pieces`, in order; resumed where the connection is cut, as long as the time allows.

        The time begins anew with every 128 KiB that arrive.
        """
        self._check(offset, size)
        patience = self._client.patience()
        done, end = offset, offset + size
        arrived = 0
        while done < end:
            response = self._request(done, end, patience)
            position = self._start(response, done, end)
            error: EncfsError
            try:
                for chunk in read_chunks(response, patience):
                    if position + len(chunk) > (end if response.status_code == 206 else self.size):
                        response.close()
                        raise IntegrityError(f"{self._name}: more bytes arrive than were asked for")
                    self._client.counters.add("bytes_from_registry", len(chunk))
                    yield position, chunk
                    position += len(chunk)
                    arrived += len(chunk)
                    if position > done:
                        done = position
                        patience.forget_failures()
                    if arrived >= _LEAST_PROGRESS:
                        arrived = 0
                        patience.extend()
            except TRANSIENT as problem:
                error, _ = named_error(problem, response.url)
            else:
                if done >= end:
                    return
                error = TransportError(f"{self._name}: the connection was cut")
            self._direct = ("", 0.0)
            patience.pause(error)
            self._client.counters.add("retries")

    def _request(self, start: int, end: int, patience: Patience) -> requests.Response:
        # No If-Range: the address names the content by its digest, and everything is verified behind us.
        headers = {} if start == 0 and end == self.size else {"Range": f"bytes={start}-{end - 1}"}
        direct, until = self._direct
        if direct and time.monotonic() < until:
            response = self._client.do_request(direct, "GET", headers=headers, stream=True, patience=patience)
            if response.status_code in (200, 206):
                return response
            response.close()
            self._direct = ("", 0.0)
        response = self._client.request(
            self._url, "GET", f"blob {self._name}", _RANGE_STATUSES, headers=headers, stream=True, patience=patience
        )
        if not self._client.is_home(response.url):
            self._direct = (response.url, time.monotonic() + _DIRECT_SECONDS)
        return response

    def _start(self, response: requests.Response, start: int, end: int) -> int:
        """Where the body begins. Raises: IntegrityError where it is not what was asked for."""
        problem = ""
        length = content_length(response)
        position = start
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
            if match is None or int(match[1]) != start or not start <= int(match[2]) < end:
                problem = "another range is sent than was asked for"
            elif match[3] not in ("*", str(self.size)) or (length is not None and length > end - start):
                problem = "the registry states another size"
        elif response.status_code == 416:
            problem = "it is shorter than it claims"
        else:
            if length is not None and length != self.size:
                problem = f"it has {length} bytes, not {self.size}"
            elif start or end != self.size:
                self._client.note_no_ranges()
            position = 0
        if problem:
            response.close()
            raise IntegrityError(f"{self._name}: {problem}")
        return position
