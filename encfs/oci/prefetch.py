"""Fetch whole blobs into the ciphertext cache, verified against their digests.

Not here: reading what is needed when it is needed (`cached`).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from encfs.encoding import parse_digest
from encfs.errors import IntegrityError, StorageError, UsageError
from encfs.format.descriptor import SEGMENT_TYPE, TREE_TYPE
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.oci.cache import Cache
from encfs.oci.cached import CachedSource
from encfs.oci.cachedblob import CachedBlob, in_order
from encfs.progress import Progress

#: Bytes of one request.
_REQUEST_SIZE = 8 << 20
_HASH_SIZE = 1 << 20
#: Wrong bytes are fetched again once.
_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class FillResult:
    """Blobs that are in the cache now, their bytes, and how many of those had to be fetched."""

    blobs: int
    size: int
    fetched: int


def fill_cache(source: CachedSource, blobs: Iterable[Descriptor], progress: Progress) -> FillResult:
    """Have the cache of `source` hold all of these blobs, each verified against its digest.

    The manifest is in the cache since `source.manifest()` was called. What is there already is not fetched again.
    Raises: UsageError where there is no cache, or a smaller one than the blobs; StorageError where the disk does not
    take them; IntegrityError, NotFoundError, TransportError, AuthenticationError.
    """
    wanted = list({item.digest: item for item in blobs}.values())
    check_room(require_cache(source), sum(item.size for item in wanted))
    missing = sum(_count_missing(source, item) for item in wanted)
    filler = _Filler(source, progress)
    progress.begin("fetch", missing)
    try:
        for item in wanted:
            filler.fill(item)
    finally:
        filler.close()
        progress.end()
    return FillResult(len(wanted), sum(item.size for item in wanted), filler.fetched)


def require_cache(source: CachedSource) -> Cache:
    """The cache of a source. Raises: UsageError where it has none."""
    if source.cache is None:
        raise UsageError("there is no cache to fetch into", hint="name a directory with --cache-dir")
    return source.cache


def check_room(cache: Cache, size: int) -> None:
    """Raises: UsageError where the cache cannot hold an artifact of `size` bytes."""
    room = cache.room
    if size > room:
        raise UsageError(
            f"the artifact has {size} bytes, and a cache of {cache.size} bytes keeps {room}",
            hint="raise --cache-size",
        )


def _is_document(blob: Descriptor) -> bool:
    """Whether a blob is read whole, and kept so, rather than in parts."""
    return blob.size <= MAX_MANIFEST_SIZE and blob.media_type not in (TREE_TYPE, SEGMENT_TYPE)


def _count_missing(source: CachedSource, blob: Descriptor) -> int:
    """Bytes of a blob that the cache lacks."""
    if source.cache is None:
        return blob.size
    if _is_document(blob):
        return 0 if source.cache.read_document(blob.digest, MAX_MANIFEST_SIZE) is not None else blob.size
    return sum(end - start for start, end in CachedBlob(source.cache, blob.digest, blob.size).missing(0, blob.size))


class _Filler:
    """Fills the cache blob by blob. `fill` is for one thread."""

    def __init__(self, source: CachedSource, progress: Progress) -> None:
        self.fetched = 0
        self._source = source
        self._progress = progress
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max(1, source.options.concurrency), thread_name_prefix="fill")

    def fill(self, blob: Descriptor) -> None:
        """Raises: as `fill_cache`."""
        if _is_document(blob):
            missing = _count_missing(self._source, blob)
            self._source.read_blob(blob, limit=MAX_MANIFEST_SIZE)
            self._count(missing)
            return
        cached = self._source.cached_blob(blob)
        assert cached is not None  # noqa: S101 - `require_cache` came first
        try:
            for _ in range(_ATTEMPTS):
                self._fetch_missing(blob, cached, 0, blob.size)
                if self._is_whole(blob, cached):
                    return
                cached.drop(0, blob.size)
                self._source.remote_blob(blob).discard(0, blob.size)
        finally:
            cached.close()
        raise IntegrityError(f"blob {blob.digest} of {self._source} has other content than its digest says")

    def _fetch_missing(self, blob: Descriptor, cached: CachedBlob, start: int, end: int) -> None:
        """Fetch what is missing of a range, unverified."""
        requests = [
            (first, min(first + _REQUEST_SIZE, last))
            for gap, last in cached.missing(start, end)
            for first in range(gap, last, _REQUEST_SIZE)
        ]
        # A registry that does not serve parts answers the first request with all of it.
        for request in requests[:1]:
            self._fetch(blob, cached, *request)
        tasks = [self._pool.submit(self._fetch, blob, cached, *request) for request in requests[1:]]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()

    def _fetch(self, blob: Descriptor, cached: CachedBlob, start: int, end: int) -> None:
        for first, last in cached.missing(start, end):
            pieces = self._source.remote_blob(blob).pieces(first, last - first)
            for offset, data in in_order(pieces):
                if not cached.write(offset, data):
                    raise StorageError(
                        f"the cache in {self._source.options.cache_dir} does not take what is fetched",
                        hint="free some space, or name another directory with --cache-dir",
                    )
                self._count(len(data))

    def _count(self, size: int) -> None:
        with self._lock:
            self.fetched += size
            self._progress.advance(size)

    def _is_whole(self, blob: Descriptor, cached: CachedBlob) -> bool:
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASH_SIZE, blob.size)))
        for offset in range(0, blob.size, _HASH_SIZE):
            piece = buffer[: min(_HASH_SIZE, blob.size - offset)]
            if not cached.read_into(offset, piece):
                raise StorageError(
                    f"the cache in {self._source.options.cache_dir} has lost what was put there",
                    hint="raise --cache-size, or name another directory with --cache-dir",
                )
            digest.update(piece)
        return digest.digest() == parse_digest(blob.digest)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
