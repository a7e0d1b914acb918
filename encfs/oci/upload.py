"""Upload blobs: in resumable chunks where the registry takes them, in one streamed request elsewhere.

Constant memory: bytes go from the source to the socket. Nothing is sent twice by itself: after a cut the registry is
asked how much it has (distribution-spec, "Pushing a blob in chunks"), and the source is opened anew from there.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

from encfs.errors import AuthenticationError, EncfsError, IntegrityError, NotFoundError, TransportError
from encfs.oci.blobs import Descriptor
from encfs.oci.client import Client
from encfs.oci.http import Body, resolve, status_error

if TYPE_CHECKING:
    import requests

Stream = Callable[[int], Iterator[bytes]]

#: A chunk is large enough to cost nothing, and small enough for proxies that bound bodies at 100 MB.
_CHUNK_SIZE = 64 << 20
#: A blob of this size or less is sent in one request.
_SINGLE_SIZE = 4 << 20
_MAX_CHUNK_SIZE = 1 << 30

_OCTETS = {"Content-Type": "application/octet-stream"}
_RANGE = re.compile(r"(?:bytes=)?0-([0-9]{1,19})", re.ASCII)
#: Answers to a PATCH by which registries say that they take no chunks, or none of that size.
#: 201: it takes the first chunk for the whole.
_NO_CHUNKS = frozenset({200, 201, 400, 405, 411, 413, 415, 501})
#: Failures in a row, without the registry having got any further.
_MAX_FAILURES = 5


class _SourceFailedError(Exception):
    """Carries an error of the source through the HTTP library, apart from errors of the upload."""

    def __init__(self, error: EncfsError) -> None:
        super().__init__(str(error))
        self.error = error


class _RestartError(Exception):
    """The upload session is lost: begin a new one. `error` is raised where that cannot be."""

    def __init__(self, error: EncfsError) -> None:
        super().__init__(str(error))
        self.error = error


class _NoChunksError(Exception):
    """The registry takes no chunks, or none of that size."""


class _Source:
    """The bytes of a blob from any offset; goes on where it is, or opens the stream anew. Reports progress once."""

    def __init__(self, stream: Stream, advance: Callable[[int], None], sent: Callable[[], None]) -> None:
        """`sent` is called for every piece that left."""
        self._stream = stream
        self._advance = advance
        self._sent = sent
        self._chunks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._position = -1
        self._reported = 0

    def take(self, offset: int, size: int) -> Iterator[memoryview]:
        """`size` bytes from `offset`."""
        if offset != self._position:
            self._position, self._rest = offset, memoryview(b"")
            self._chunks = self._open(offset)
        while size:
            if not self._rest:
                self._rest = self._next()
            piece, self._rest = self._rest[:size], self._rest[size:]
            size -= len(piece)
            self._position += len(piece)
            yield piece
            self._sent()
            self.report(self._position)

    def report(self, position: int) -> None:
        """Everything before `position` is done."""
        if position > self._reported:
            self._advance(position - self._reported)
            self._reported = position

    def _open(self, offset: int) -> Iterator[bytes]:
        try:
            return iter(self._stream(offset))
        except EncfsError as error:
            raise _SourceFailedError(error) from None

    def _next(self) -> memoryview:
        try:
            return memoryview(next(self._chunks, b"") or _end_of_source())
        except EncfsError as error:
            raise _SourceFailedError(error) from None

    def finish(self) -> None:
        """Have a stream that was read to its end make its last check."""
        try:
            if next(self._chunks, None) is not None:
                raise _SourceFailedError(IntegrityError("a blob has more bytes than its size says"))
        except EncfsError as error:
            raise _SourceFailedError(error) from None


def _end_of_source() -> bytes:
    raise IntegrityError("a blob ends before its size says")


class Uploader:
    """Uploads to one repository. Thread-safe; remembers what the registry takes."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._takes_chunks = True

    def upload(
        self, descriptor: Descriptor, stream: Stream, advance: Callable[[int], None], *, mount_from: str = ""
    ) -> None:
        """Upload a blob, or have it mounted from another repository of the same registry.

        Raises: TransportError, AuthenticationError, what `stream` raises.
        """
        task = _Upload(self._client, descriptor, stream, advance)
        failures = 0
        while True:
            try:
                begun = task.begin(mount_from)
                if begun is not None and self._takes_chunks and descriptor.size > _SINGLE_SIZE:
                    task.send_chunks(*begun)
                elif begun is not None:
                    task.send_whole(begun[0])
            except _SourceFailedError as failed:
                raise failed.error from None
            except _NoChunksError:
                self._takes_chunks = False
            except _RestartError as lost:
                failures += 1
                if failures >= _MAX_FAILURES:
                    raise lost.error from None
                task.pause(lost.error)
            else:
                task.source.report(descriptor.size)
                return


class _Upload:
    """One blob on its way. `patience` is for what may be repeated, `sending` for what must not be blindly."""

    def __init__(self, client: Client, descriptor: Descriptor, stream: Stream, advance: Callable[[int], None]) -> None:
        self._client = client
        self._descriptor = descriptor
        self._patience = client.patience()
        self._sending = client.patience(attempts=1)
        self.source = _Source(stream, advance, self._sent)

    def _sent(self) -> None:
        self._patience.extend()
        self._sending.extend()

    def pause(self, error: EncfsError) -> None:
        """Wait before another attempt; raises `error` where the registry asks for more than there is patience."""
        self._patience.extend()  # what failed may have used all of the time; `_MAX_FAILURES` is the bound
        self._patience.pause(error, at_least=self._sending.asked_to_wait)

    def begin(self, mount_from: str) -> tuple[str, int] | None:
        """The address to upload to and the size of chunks; None where the blob was mounted."""
        url = self._client.url("blobs", "uploads/")
        response: requests.Response | None = None
        if mount_from:
            # It may be forbidden to read there, and some registries say "not found" instead of beginning an upload.
            with contextlib.suppress(AuthenticationError, NotFoundError):
                response = self._begin(f"{url}?mount={self._descriptor.digest}&from={quote(mount_from, safe='')}")
        response = response or self._begin(url)
        if response.status_code == 201:
            return None
        smallest = response.headers.get("OCI-Chunk-Min-Length", "")
        size = int(smallest) if smallest.isascii() and smallest.isdigit() and len(smallest) < 12 else 0
        return self._location(response), max(_CHUNK_SIZE, min(size, _MAX_CHUNK_SIZE))

    def _begin(self, url: str) -> requests.Response:
        statuses = frozenset({201, 202})
        return self._client.request(
            url,
            "POST",
            f"uploads to {self._client.repository}",
            statuses,
            data=b"",
            headers=_OCTETS,
            patience=self._patience,
        )

    def _location(self, response: requests.Response) -> str:
        location = response.headers.get("Location")
        if not location:
            raise TransportError(f"{self._client.registry} does not say where to upload to")
        return resolve(response.url, location)

    def _send(self, method: str, url: str, body: Body, **headers: str) -> requests.Response:
        """Raises: AuthenticationError, TransportError after a single attempt."""
        self._sending.renew()
        return self._client.do_request(url, method, body, {**_OCTETS, **headers}, patience=self._sending)

    def send_whole(self, location: str) -> None:
        """All of the blob in one request."""
        blob = self._descriptor
        self._complete(location, Body(blob.size, lambda: self.source.take(0, blob.size)))

    def send_chunks(self, location: str, chunk_size: int) -> None:
        """One request for each chunk, and one to complete."""
        offset = failures = 0
        while offset < self._descriptor.size:
            before = offset
            try:
                location, offset = self._send_chunk(location, offset, min(chunk_size, self._descriptor.size - offset))
            except AuthenticationError:
                raise
            except TransportError as error:
                self.pause(error)
                location, offset = self._progress(location, error)
                failures += 1
                if failures >= _MAX_FAILURES and offset <= before:
                    raise
            if offset > before:
                failures = 0
                self._patience.renew()
        self._complete(location, Body(0, lambda: iter(())))

    def _send_chunk(self, location: str, offset: int, size: int) -> tuple[str, int]:
        """Where to go on, and from which offset."""
        body = Body(size, lambda: self.source.take(offset, size))
        response = self._send("PATCH", location, body, **{"Content-Range": f"{offset}-{offset + size - 1}"})
        status = response.status_code
        if status in (202, 204):
            # Some registries keep less than they were sent, and say so.
            stored = _stored(response)
            kept = stored if stored is not None and offset < stored <= offset + size else offset + size
            return self._location(response), kept
        if status in _NO_CHUNKS:
            raise _NoChunksError
        error = status_error(response, response.content, "a chunk of a blob")
        if status == 404:
            raise _RestartError(error)
        if status == 416:
            # It has another number of bytes than we think.
            raise TransportError(error.message)
        raise error

    def _progress(self, location: str, error: EncfsError) -> tuple[str, int]:
        """Where to go on after a failure: the registry says how much it has."""
        response = self._client.do_request(location, "GET", patience=self._patience)
        stored = _stored(response)
        if response.status_code != 204 or stored is None or stored > self._descriptor.size:
            raise _RestartError(error)
        return resolve(response.url, response.headers.get("Location", location)), stored

    def _complete(self, location: str, body: Body) -> None:
        try:
            response = self._send("PUT", _with_digest(location, self._descriptor.digest), body)
        except AuthenticationError:
            raise
        except TransportError as error:
            raise _RestartError(error) from None
        if response.status_code in (200, 201, 204):
            return
        refusal = status_error(response, response.content, f"blob {self._descriptor.digest}")
        if isinstance(refusal, AuthenticationError):
            raise refusal
        # Whatever went wrong with this session; where the source is at fault, that says more.
        self.source.finish()
        raise _RestartError(refusal)


def _stored(response: requests.Response) -> int | None:
    """The number of bytes a registry has of an upload (header "Range: 0-<last>"; absent or "0-0" for none)."""
    match = _RANGE.fullmatch(response.headers.get("Range", "").strip())
    if match is None:
        return 0 if response.status_code == 204 and "Range" not in response.headers else None
    last = int(match[1])
    return last + 1 if last else 0


def _with_digest(location: str, digest: str) -> str:
    parts = urlsplit(location)
    query = f"{parts.query}&digest={digest}" if parts.query else f"digest={digest}"
    return urlunsplit(parts._replace(query=query))
