"""Read many ranges of a volume at once, straight into the caller's memory, on a few plain threads.

For callers that want all of something large: tensors, whole files. Hashing and decryption release the interpreter's
lock, so that threads help from a few hundred kilobytes on. Not here: reading ahead of a reader that asks for one piece
after the other (`encfs.format.readahead`), checking and decrypting (`encfs.format.volume`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from encfs.errors import UsageError
from encfs.format.plaintext import Volume
from encfs.memory import populate

#: Bytes that one thread takes at a time: a multiple of every frame size that pays.
PIECE_SIZE = 4 << 20
#: Fewer bytes than this are read by the caller itself.
_INLINE_SIZE = 1 << 20
#: Pieces that wait for a thread; the rest is not even listed yet.
_QUEUED = 64

Range = tuple[int, memoryview]


def closed_error() -> UsageError:
    """What is said to readers of something that was closed."""
    return UsageError("the artifact is closed", hint="read before it is closed, or open it again")


def default_threads() -> int:
    """As many as there are processors, from 2 (one may wait for the store) to 8: more get in each other's way."""
    count = os.process_cpu_count() if hasattr(os, "process_cpu_count") else len(os.sched_getaffinity(0))
    return max(2, min(8, count or 1))


class ParallelReader:
    """The threads that read one volume. Thread-safe; made when they are first needed, ended by `close`."""

    def __init__(self, volume: Volume, *, threads: int | None = None) -> None:
        self.volume = volume
        self._threads = default_threads() if threads is None else threads
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False
        self._lock = threading.Lock()

    def read_into(self, ranges: Iterable[Range]) -> None:
        """Fill each buffer with verified bytes of the image from its offset; every byte must be inside the image.

        Where one range fails, all buffers are wiped when no thread writes to them any more: nobody is left with half
        of what he asked for. Raises: as `VolumeReader.read_into`.
        """
        wanted = [(offset, buffer) for offset, buffer in ranges if len(buffer)]
        try:
            pool = self._pool_for(sum(len(buffer) for _, buffer in wanted))
            if pool is None:
                for offset, buffer in wanted:
                    self._fill(offset, buffer)
            else:
                self._fill_in_threads(pool, _pieces(wanted))
        except BaseException:
            for _, buffer in wanted:
                buffer[:] = bytes(len(buffer))
            raise

    def close(self) -> None:
        """End the threads. Readers that wait for them get UsageError; pieces that are being read are waited for."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            # Not with cancel_futures: whoever waits for a piece would wait for ever. Each ends at once by itself.
            pool.shutdown()

    def _fill(self, offset: int, buffer: memoryview) -> None:
        if self.volume.read_into(offset, buffer) != len(buffer):
            raise ValueError("the range to read ends beyond the image")

    def _fill_piece(self, offset: int, buffer: memoryview) -> None:
        if self._closed:
            raise closed_error()
        populate(buffer)
        self._fill(offset, buffer)

    def _pool_for(self, size: int) -> ThreadPoolExecutor | None:
        """The threads, where there are to be some and so many bytes are worth it; none after the end."""
        if self._threads < 2 or size < _INLINE_SIZE:
            return None
        with self._lock:
            if self._pool is None and not self._closed:
                self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="encfs-read")
            return self._pool

    def _submit(self, pool: ThreadPoolExecutor, offset: int, buffer: memoryview) -> Future[None]:
        try:
            return pool.submit(self._fill_piece, offset, buffer)
        except RuntimeError:
            if self._closed:
                raise closed_error() from None
            raise

    def _fill_in_threads(self, pool: ThreadPoolExecutor, pieces: Iterator[Range]) -> None:
        waiting: set[Future[None]] = set()
        try:
            for offset, buffer in pieces:
                waiting.add(self._submit(pool, offset, buffer))
                if len(waiting) >= _QUEUED:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        finally:
            # On failure nobody may write to the buffers after they were wiped.
            for future in waiting:
                future.cancel()
            wait(waiting)


def _pieces(ranges: Iterable[Range]) -> Iterator[Range]:
    """Ranges cut where multiples of PIECE_SIZE lie in the image, so that two threads never open the same frame."""
    for offset, buffer in ranges:
        start = 0
        while start < len(buffer):
            size = PIECE_SIZE - (offset + start) % PIECE_SIZE
            yield offset + start, buffer[start : start + size]
            start += size
