"""What all blobs of one store share while they are fetched: connections, memory for what has arrived, counters.

Not here: what is fetched, and when (`fetching`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol

from encfs.oci.counters import TransferCounters
from encfs.oci.lanes import Lanes

#: Bytes in memory of all blobs of a store: read ahead and not yet read, or not taken by the cache.
_MEMORY = 32 << 20


class Fetch:
    """A range on its way, or in memory. `done` is how far it has arrived, from `start`. Guarded by its blob's lock."""

    __slots__ = ("awaited", "buffer", "done", "end", "error", "finished", "kept", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.done = start
        self.buffer: memoryview | None = None
        self.finished = False
        self.kept = False
        self.awaited = False
        self.error: Exception | None = None


class Holder(Protocol):
    """The blob that a fetch belongs to."""

    def forget(self, fetch: Fetch) -> None:
        """Its memory is needed for something else."""


class Fetcher:
    """What all blobs of one store share: connections, memory, counters."""

    def __init__(self, concurrency: int, io_timeout: float, counters: TransferCounters) -> None:
        """`io_timeout`: seconds that a reader waits while nothing arrives."""
        self.lanes = Lanes(concurrency)
        self.io_timeout = io_timeout
        self.counters = counters
        #: Whether the registry answered a request for a range with the whole blob.
        self.whole = False
        self.probed = False
        self.probe = threading.Lock()
        self._lock = threading.Lock()
        self._memory = 0
        self._kept: OrderedDict[Fetch, Holder] = OrderedDict()

    def reserve(self, size: int, *, anyway: bool) -> bool:
        """Count `size` bytes of memory, dropping what was not used for longest; False where there is no room."""
        victims: list[tuple[Fetch, Holder]] = []
        with self._lock:
            while self._memory + size > _MEMORY and self._kept:
                fetch, blob = self._kept.popitem(last=False)
                fetch.kept = False
                self._memory -= fetch.end - fetch.start
                victims.append((fetch, blob))
            fits = anyway or self._memory + size <= _MEMORY
            if fits:
                self._memory += size
        for fetch, blob in victims:
            blob.forget(fetch)
        return fits

    def release(self, size: int) -> None:
        """Bytes of memory that are no longer used."""
        with self._lock:
            self._memory -= size

    def keep(self, fetch: Fetch, blob: Holder) -> None:
        """Leave what has arrived in memory until the room is needed."""
        with self._lock:
            self._kept[fetch] = blob
            fetch.kept = True

    def touch(self, fetch: Fetch) -> None:
        with self._lock:
            if fetch.kept:
                self._kept.move_to_end(fetch)

    def drop(self, fetch: Fetch) -> None:
        """Give its memory back."""
        with self._lock:
            if fetch.kept:
                fetch.kept = False
                del self._kept[fetch]
                self._memory -= fetch.end - fetch.start

    def close(self) -> None:
        self.lanes.close()
