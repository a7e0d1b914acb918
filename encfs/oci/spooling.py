"""Blobs on their way to a registry: written to a temporary file, uploaded from there while the next is written.

Not here: the upload itself (`upload`).
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from encfs.errors import EncfsError, TransportError
from encfs.oci.blobs import Buffer, Descriptor
from encfs.oci.files import FileWriter, storage_errors
from encfs.oci.upload import Uploader

#: Segments that wait for their upload or are being uploaded; with the one being written, so many lie in the spool.
_MAX_PENDING = 2
_READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class _Pending:
    digest: str
    file: FileWriter
    done: Future[None]


class UploadQueue:
    """Uploads in the background, bounded in number. The first failure is raised by whatever is called next."""

    def __init__(self, uploader: Uploader) -> None:
        self._uploader = uploader
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[_Pending] = deque()
        self._cancelled: set[str] = set()

    def submit(self, descriptor: Descriptor, file: FileWriter) -> None:
        """Upload a file and close it; waits while there are too many already. Raises: what an earlier upload raised."""
        self._reduce(_MAX_PENDING - 1)
        self._pool = self._pool or ThreadPoolExecutor(_MAX_PENDING, thread_name_prefix="upload")
        self._pending.append(_Pending(descriptor.digest, file, self._pool.submit(self._upload, descriptor, file)))

    def wait(self) -> None:
        """Raises: what an upload raised."""
        self._reduce(0)

    def _reduce(self, count: int) -> None:
        while len(self._pending) > count:
            self._pending.popleft().done.result()

    def _upload(self, descriptor: Descriptor, file: FileWriter) -> None:
        def stream(offset: int) -> Iterator[bytes]:
            for position in range(offset, descriptor.size, _READ_SIZE):
                if descriptor.digest in self._cancelled:
                    raise TransportError(f"the upload of {descriptor.digest} was cancelled")
                yield file.read_back(position, min(_READ_SIZE, descriptor.size - position))

        with contextlib.closing(file):
            self._uploader.upload(descriptor, stream, lambda size: None)

    def cancel(self, digest: str) -> None:
        """End one upload, if it is under way."""
        for item in [item for item in self._pending if item.digest == digest]:
            self._end(item)

    def close(self) -> None:
        """End all of them."""
        for item in list(self._pending):
            self._end(item)
        if self._pool is not None:
            self._pool.shutdown()

    def _end(self, item: _Pending) -> None:
        self._cancelled.add(item.digest)
        self._pending.remove(item)
        if item.done.cancel():
            item.file.close()
        else:
            with contextlib.suppress(EncfsError):
                item.done.result()


class SpooledWriter:
    """A `BlobWriter` that keeps the blob in a temporary file until it is uploaded."""

    def __init__(self, uploads: UploadQueue, directory: str) -> None:
        """Raises: StorageError."""
        self._uploads = uploads
        with storage_errors(directory):
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._file: FileWriter | None = FileWriter(self._directory, directory)
        except BaseException:
            os.close(self._directory)
            raise

    def write(self, data: Buffer) -> None:
        """Raises: StorageError."""
        assert self._file is not None  # noqa: S101 - not after commit or abort
        self._file.write(data)

    def digest(self) -> str:
        assert self._file is not None  # noqa: S101
        return f"sha256:{self._file.hexdigest()}"

    def commit(self, media_type: str) -> Descriptor:
        """Hand the blob over to its upload; `put_manifest` waits for it. Raises: what an earlier upload raised."""
        assert self._file is not None  # noqa: S101
        descriptor = Descriptor(media_type, self.digest(), self._file.position)
        self._uploads.submit(descriptor, self._file)
        self._file = None
        self.abort()
        return descriptor

    def abort(self) -> None:
        """Throw away what was not committed; harmless when called again."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1
