"""Sequential read-ahead over a volume: plain threads fill a bounded ring of reused buffers ahead of a reader.

A `Stream` belongs to one reader going through one range of the image (a file). It predicts the next request from the
last two, and has it decrypted before it is asked for. What it gives out is a view of a ring buffer, valid until the
stream is used again. Random access costs nothing: no thread is involved before one request follows another.

Not here: checking and decrypting (`volume`); waiting for network or disk without blocking an event loop (`mount`).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from encfs.format.plaintext import Volume

#: Largest request that is predicted (bytes): what the kernel asks for at most through FUSE.
MAX_WINDOW = 1 << 20
#: Requests that a stream keeps decrypted or being decrypted ahead of its reader.
_DEPTH = 4
#: Ring buffers of all streams together.
_BUFFERS = 16


@dataclass(slots=True, eq=False)
class _Window:
    """One predicted request: `buffer` holds `size` bytes from `offset` once `done` has no exception."""

    offset: int
    size: int
    buffer: memoryview
    done: Future[None]

    @property
    def end(self) -> int:
        return self.offset + self.size


class ReadAhead:
    """The threads and buffers that the streams of one volume share. Thread-safe."""

    def __init__(self, volume: Volume, *, threads: int | None = None) -> None:
        self.volume = volume
        self._pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1), thread_name_prefix="readahead")
        self._free: deque[memoryview] = deque()
        self._made = 0
        self._lock = threading.Lock()

    def stream(self, start: int, end: int) -> Stream:
        """A reader of the image's bytes from `start` to `end`."""
        return Stream(self, start, end)

    def acquire(self) -> memoryview | None:
        """A buffer of MAX_WINDOW bytes; None where all are in use."""
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._made == _BUFFERS:
                return None
            self._made += 1
        return memoryview(bytearray(MAX_WINDOW))

    def release(self, buffer: memoryview) -> None:
        with self._lock:
            self._free.append(buffer)

    def fill(self, window_offset: int, buffer: memoryview) -> Future[None]:
        """Start reading from `window_offset` into `buffer`."""
        return self._pool.submit(self._fill, window_offset, buffer)

    def _fill(self, offset: int, buffer: memoryview) -> None:
        self.volume.read_into(offset, buffer)

    def close(self) -> None:
        """End the threads; what was not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)


class Stream:
    """One reader. Used by one thread at a time."""

    def __init__(self, ahead: ReadAhead, start: int, end: int) -> None:
        self._ahead = ahead
        self._start = start
        self._end = end
        self._next = -1
        self._windows: deque[_Window] = deque()
        self._spent: list[_Window] = []

    def take(self, offset: int, size: int) -> memoryview | Future[None] | None:
        """The bytes of a request if they were predicted and are ready.

        A Future where they are still being read: wait for it and call again. None where they were not predicted, or
        reading them ahead failed: read them from the volume, which gives the reason. The view is valid until the
        next call.
        """
        self._recycle()
        while self._windows and self._windows[0].end <= offset:
            self._spent.append(self._windows.popleft())
        if self._windows and self._windows[0].offset <= offset and offset + size <= self._windows[0].end:
            window = self._windows[0]
            if not window.done.done():
                return window.done
            self._next = offset + size
            if window.done.cancelled() or window.done.exception() is not None:
                self._drop()
                return None
            self._predict(size)
            start = offset - window.offset
            return window.buffer[start : start + size]
        sequential = offset == self._next
        self._next = offset + size
        self._drop()
        if sequential:
            self._predict(size)
        return None

    def close(self) -> None:
        """Give all buffers back."""
        self._drop()
        for window in self._spent:
            self._release(window)
        self._spent.clear()

    def _predict(self, size: int) -> None:
        """Keep up to _DEPTH windows of the reader's request size going behind what it has taken."""
        size = min(size, MAX_WINDOW)
        offset = self._windows[-1].end if self._windows else self._next
        while len(self._windows) <= _DEPTH and offset < self._end:
            buffer = self._ahead.acquire()
            if buffer is None:
                return
            length = min(size, self._end - offset)
            self._windows.append(_Window(offset, length, buffer, self._ahead.fill(offset, buffer[:length])))
            offset += length

    def _drop(self) -> None:
        self._spent.extend(self._windows)
        self._windows.clear()

    def _recycle(self) -> None:
        """Give back the buffers of windows behind the reader; its last view of them is no longer in use."""
        waiting = [window for window in self._spent if not window.done.done() and not window.done.cancel()]
        for window in self._spent:
            if window not in waiting:
                self._release(window)
        self._spent = waiting

    def _release(self, window: _Window) -> None:
        # A buffer that a thread still writes to goes back when it is through.
        if window.done.done() or window.done.cancel():
            self._ahead.release(window.buffer)
        else:
            window.done.add_done_callback(lambda _: self._ahead.release(window.buffer))
