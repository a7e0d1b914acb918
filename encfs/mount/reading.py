"""Where the filesystem's bytes come from: metadata and contents of the image, never waited for on the event loop.

On the event loop's thread nothing here waits for disk or network: what is not at hand raises `NotAtHandError`, and the
caller repeats the whole call in a worker thread, where the same functions wait. Not here: FUSE (`filesystem`), checking
and decrypting (`encfs.format.volume`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache

from encfs.erofs.reader import ErofsReader
from encfs.erofs.tree import Read, ServedTree
from encfs.errors import FormatError
from encfs.format.plaintext import Volume
from encfs.mount.options import MAX_REQUEST

#: Parsed inodes that are kept, for reads and lookups that come back to the same ones.
_INODES = 1024
_ZEROS = bytes(64 << 10)


class NotAtHandError(Exception):
    """A byte is not at hand, and this thread must not wait for it. Never leaves this package."""


class ImageContents:
    """The image of a volume. Thread-safe.

    Buffers are reused: fresh memory for every request would cost most of the throughput. Those given out by `read_now`
    and `take_buffer` are valid for one reply, which pyfuse3 sends before the event loop runs anything else.
    """

    def __init__(self, volume: Volume, tree: Callable[[Read], ServedTree] | None = None) -> None:
        """May wait. `tree` makes of reads what is served, by default the image. Raises what it and the volume raise."""
        self.volume = volume
        self._loop_thread: int | None = None
        self.image = ErofsReader(self._read_metadata, volume.size) if tree is None else tree(self._read_metadata)
        self.inode = lru_cache(maxsize=_INODES)(self.image.inode)
        self._reply = memoryview(bytearray(MAX_REQUEST))
        self._free: deque[memoryview] = deque()

    def bind_to_loop(self) -> None:
        """From now on the calling thread is the event loop's, and does not wait."""
        self._loop_thread = threading.get_ident()

    def close(self) -> None:
        self.inode.cache_clear()
        self.volume.close()

    def _read_metadata(self, offset: int, size: int) -> bytes | memoryview:
        if threading.get_ident() != self._loop_thread:
            return self.volume.read(offset, size)
        buffer = memoryview(bytearray(size))
        done = self.volume.try_read_into(offset, buffer)
        if done is None:
            raise NotAtHandError
        return buffer[:done]

    # Contents of files

    def read_now(self, nid: int, offset: int, size: int) -> memoryview:
        """At most `size` bytes of a file, fewer only at its end. The view is valid until the next call.

        Event loop's thread only. Raises: NotAtHandError, what `ErofsReader` and the volume raise.
        """
        if size > MAX_REQUEST:
            raise NotAtHandError
        buffer = self._reply
        position = 0
        for place, length in self.image.extents(self.inode(nid), offset, size):
            part = buffer[position : position + length]
            if place is None:
                _clear(part)
            else:
                done = self.volume.try_read_into(place, part)
                if done is None:
                    raise NotAtHandError
                _check_length(done, length)
            position += length
        return buffer[:position]

    def read_waiting(self, nid: int, offset: int, buffer: memoryview) -> memoryview:
        """The same into the caller's buffer, waiting for disk and network."""
        position = 0
        for place, length in self.image.extents(self.inode(nid), offset, len(buffer)):
            part = buffer[position : position + length]
            if place is None:
                _clear(part)
            else:
                _check_length(self.volume.read_into(place, part), length)
            position += length
        return buffer[:position]

    # Buffers of waiting reads

    def take_buffer(self, size: int) -> memoryview:
        """Room for `size` bytes. Give it back with `return_buffer`, whole."""
        if size > MAX_REQUEST:
            return memoryview(bytearray(size))
        return self._free.pop() if self._free else memoryview(bytearray(MAX_REQUEST))

    def return_buffer(self, buffer: memoryview) -> None:
        if len(buffer) == MAX_REQUEST:
            self._free.append(buffer)


def _clear(part: memoryview) -> None:
    for start in range(0, len(part), len(_ZEROS)):
        piece = part[start : start + len(_ZEROS)]
        piece[:] = _ZEROS[: len(piece)]


def _check_length(done: int, wanted: int) -> None:
    if done != wanted:
        raise FormatError("the image ends before the contents of a file")
