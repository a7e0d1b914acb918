"""Copy blobs from one store to another, several at a time. Not here: which blobs make up an artifact."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from encfs.errors import IntegrityError, TransportError
from encfs.oci.blobs import BlobSource, BlobTarget, Descriptor
from encfs.oci.options import DEFAULT_CONCURRENCY
from encfs.progress import Progress

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class TransferResult:
    """Blobs that were missing, their bytes, and blobs that were there already."""

    copied: int
    copied_size: int
    present: int


def copy_blobs(
    source: BlobSource,
    target: BlobTarget,
    blobs: Iterable[Descriptor],
    *,
    progress: Progress,
    concurrency: int = DEFAULT_CONCURRENCY,
) -> TransferResult:
    """Copy those blobs that the target lacks; sizes and digests are verified on the way.

    After a failure, what is complete stays, and most of the rest is gone on with by the next call.
    Raises: IntegrityError, what the stores raise.
    """
    wanted = list({item.digest: item for item in blobs}.values())
    copier = _Copier(source, target, progress)
    with ThreadPoolExecutor(concurrency, thread_name_prefix="copy") as pool:
        try:
            present = _results(pool.submit(target.has_blob, item) for item in wanted)
            missing = [item for item, there in zip(wanted, present, strict=True) if not there]
            size = sum(item.size for item in missing)
            progress.begin("copy", size)
            _results(pool.submit(copier.copy, item) for item in missing)
        except BaseException:
            copier.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            progress.end()
    return TransferResult(len(missing), size, len(wanted) - len(missing))


def _results(tasks: Iterable[Future[_Result]]) -> list[_Result]:
    """All results, or the first failure in order."""
    return [task.result() for task in list(tasks)]


class _Copier:
    """Copies single blobs in several threads that report to one progress."""

    def __init__(self, source: BlobSource, target: BlobTarget, progress: Progress) -> None:
        self._source = source
        self._target = target
        self._progress = progress
        self._lock = threading.Lock()
        #: Bytes of each blob that were reported as done.
        self._done: dict[str, int] = {}
        self.stopped = threading.Event()

    def copy(self, blob: Descriptor) -> None:
        try:
            self._copy(blob)
        except IntegrityError:
            # Wrong bytes: there may be another place to get them from, or they come right the next time.
            opened = self._source.open_blob(blob)
            with closing(opened):
                if not opened.discard(0, blob.size):
                    raise
            self._copy(blob)

    def _copy(self, blob: Descriptor) -> None:
        reported = 0

        def advance(size: int) -> None:
            # A second attempt reports only what the first one had not done.
            nonlocal reported
            reported += size
            with self._lock:
                new = reported - self._done.get(blob.digest, 0)
                if new > 0:
                    self._done[blob.digest] = reported
                    self._progress.advance(new)

        self._target.copy_blob(blob, lambda offset: self._stream(blob, offset), advance)

    def _stream(self, blob: Descriptor, offset: int) -> Iterator[bytes]:
        for chunk in self._source.stream_blob(blob, offset=offset, verify=not self._target.verifies):
            if self.stopped.is_set():
                raise TransportError("another part of the copy failed")
            yield chunk
