"""One blob in the ciphertext cache: which of its bytes are there, reading them, adding to them.

A blob is kept in sparse files of up to 64 MiB of it, each with a byte for every 4 KiB that says whether they are there.
That byte is written after the bytes themselves, so that a crash leaves nothing half written that counts. Not here: the
directory, its size and what is evicted from it (`cache`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator

from encfs.encoding import parse_digest
from encfs.oci.cache import GRAIN, Cache, is_evicted
from encfs.oci.files import PooledFile

#: Bytes of a blob in one file: the unit of eviction.
PART_SIZE = 64 << 20

_PRESENT = 1
#: A used part is marked as used at most this often (seconds).
_TOUCH_SECONDS = 60.0
#: Bytes of one write of what arrives in small pieces.
_WRITE_SIZE = 1 << 20
_NO_NOWAIT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class _Part:
    """One file: `length` bytes of the blob from `start` on, then at `map_offset` a byte for every grain of them."""

    def __init__(self, cache: Cache, name: str, start: int, length: int) -> None:
        self.name = name
        self.start = start
        self.length = length
        self.map_offset = -(-length // GRAIN) * GRAIN
        self.file_size = self.map_offset + -(-length // GRAIN)
        self.file = PooledFile(lambda: cache.open_part(name, self.file_size))
        self.touched = 0.0


class CachedBlob:
    """What is on disk of one blob. Thread-safe; the same blob may be open any number of times, in many processes."""

    def __init__(self, cache: Cache, digest: str, size: int) -> None:
        """No file is opened yet. Raises: FormatError."""
        self.size = size
        self._cache = cache
        self._name = parse_digest(digest).hex()
        self._parts: dict[int, _Part] = {}
        self._lock = threading.Lock()
        self._nowait = os.RWF_NOWAIT

    @property
    def writable(self) -> bool:
        """False for a while after the disk refused something."""
        return self._cache.writable

    @property
    def room(self) -> int:
        """Bytes that the cache keeps for certain, if nobody else uses it."""
        return self._cache.room

    # -- reading

    def read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill the buffer from `offset` if all of it is there; False otherwise, and the buffer is undefined."""
        return self._read(offset, buffer, 0)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """The same if it does not have to wait for the disk."""
        return self._read(offset, buffer, self._nowait)

    def _read(self, offset: int, buffer: memoryview, flags: int) -> bool:
        done = 0
        while done < len(buffer):
            part = self._part(offset + done)
            inside = offset + done - part.start
            length = min(len(buffer) - done, part.length - inside)
            if length <= 0 or not self._read_part(part, inside, buffer[done : done + length], flags):
                return False
            done += length
        return True

    def _read_part(self, part: _Part, inside: int, buffer: memoryview, flags: int) -> bool:
        first, stop = inside // GRAIN, -(-(inside + len(buffer)) // GRAIN)
        present = bytearray(stop - first)
        try:
            state = self._cache.files.acquire(part.file)
            try:
                if os.preadv(state.file, [present], part.map_offset + first, flags) != len(present):
                    return False
                if present.count(_PRESENT) != len(present):
                    return False
                self._touch(part, state.file)
                read = os.preadv(state.file, [buffer], inside, flags)
                # Of a file that is being evicted there may be any part, and a writer may make it larger again.
                evicted = is_evicted(os.fstat(state.file))
            finally:
                self._cache.files.release(state)
            if evicted:
                self._cache.files.drop(part.file)
            return not evicted and read == len(buffer)
        except (FileNotFoundError, BlockingIOError):
            return False
        except OSError as error:
            if flags and error.errno in _NO_NOWAIT:
                self._nowait = 0  # this filesystem cannot tell: it is asked as if it were quick
                return self._read_part(part, inside, buffer, 0)
            self._cache.failed("read", error)
            return False

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The ranges (start, end) between two offsets that are not there, in order, in whole grains."""
        gaps: list[tuple[int, int]] = []
        position = start // GRAIN * GRAIN
        end = min(-(-end // GRAIN) * GRAIN, self.size)
        while position < end:
            part = self._part(position)
            stop = min(end, part.start + part.length)
            for first, last in _gaps(self._present(part, position - part.start, stop - part.start)):
                gap = (position + first * GRAIN, min(position + last * GRAIN, stop))
                if gaps and gaps[-1][1] == gap[0]:
                    gap = (gaps.pop()[0], gap[1])
                gaps.append(gap)
            position = stop
        return gaps

    def _present(self, part: _Part, inside: int, end: int) -> bytes:
        """The bytes of the map for a range that starts at a grain."""
        first, stop = inside // GRAIN, -(-end // GRAIN)
        try:
            state = self._cache.files.acquire(part.file)
            try:
                present = os.pread(state.file, stop - first, part.map_offset + first)
            finally:
                self._cache.files.release(state)
        except FileNotFoundError:
            present = b""
        except OSError as error:
            self._cache.failed("read", error)
            present = b""
        return present.ljust(stop - first, b"\0")

    # -- writing

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> bool:
        """Keep bytes of the blob: those grains that they hold whole. False where the disk did not take them."""
        view = memoryview(data)
        end = offset + len(view)
        start = -(-offset // GRAIN) * GRAIN
        if end < self.size:
            end = end // GRAIN * GRAIN
        while start < end:
            if not self._cache.writable:
                return False
            part = self._part(start)
            stop = min(end, part.start + part.length)
            try:
                self._write_part(part, start - part.start, view[start - offset : stop - offset])
            except OSError as error:
                self._cache.failed("written", error)
                return False
            self._cache.wrote(stop - start)
            start = stop
        return True

    def _write_part(self, part: _Part, inside: int, data: memoryview) -> None:
        """Into the file that has the part's name now: one that was evicted meanwhile is let go."""
        for _ in range(4):
            try:
                state = self._cache.files.acquire(part.file)
            except FileNotFoundError:
                self._cache.create_part(part.name, part.file_size)
                continue
            try:
                if os.fstat(state.file).st_nlink:
                    _write_grains(state.file, part, inside, data)
                    return
            finally:
                self._cache.files.release(state)
            self._cache.files.drop(part.file)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def drop(self, offset: int, size: int) -> None:
        """Forget a range, all grains that it touches: it was damaged."""
        position, end = offset // GRAIN * GRAIN, min(offset + size, self.size)
        while position < end:
            part = self._part(position)
            stop = min(end, part.start + part.length)
            first, last = (position - part.start) // GRAIN, -(-(stop - part.start) // GRAIN)
            try:
                state = self._cache.files.acquire(part.file)
                try:
                    os.pwrite(state.file, bytes(last - first), part.map_offset + first)
                finally:
                    self._cache.files.release(state)
            except FileNotFoundError:
                pass  # then nothing of it is there
            except OSError:
                self._give_up(part)
            position = stop

    def _give_up(self, part: _Part) -> None:
        """The map cannot be written: better no part than a wrong one."""
        self._cache.files.drop(part.file)
        try:
            self._cache.remove_part(part.name)
        except OSError as error:
            self._cache.failed("tidied", error)

    def close(self) -> None:
        """Let the descriptors go. Harmless when called again; the blob can be used on."""
        with self._lock:
            parts = list(self._parts.values())
            self._parts.clear()
        for part in parts:
            self._cache.files.drop(part.file)

    def _part(self, offset: int) -> _Part:
        index = offset // PART_SIZE
        part = self._parts.get(index)
        if part is None:
            start = index * PART_SIZE
            with self._lock:
                part = self._parts.setdefault(
                    index,
                    _Part(self._cache, f"{self._name}.{index}", start, max(0, min(PART_SIZE, self.size - start))),
                )
        return part

    def _touch(self, part: _Part, file: int) -> None:
        """Tell eviction that the part is in use."""
        now = time.monotonic()
        if now - part.touched < _TOUCH_SECONDS and part.touched:
            return
        part.touched = now
        with contextlib.suppress(OSError):
            os.utime(file)


def _write_grains(file: int, part: _Part, inside: int, data: memoryview) -> None:
    """First the bytes, then the marks that make them count."""
    grains = -(-len(data) // GRAIN)
    position = inside
    while data:
        done = os.pwrite(file, data, position)
        position, data = position + done, data[done:]
    os.pwrite(file, bytes([_PRESENT]) * grains, part.map_offset + inside // GRAIN)


def _gaps(present: bytes) -> Iterator[tuple[int, int]]:
    """The runs (first, stop) of grains that are not marked as present."""
    flags = present.translate(_ABSENT_IS_ZERO)
    position = 0
    while (first := flags.find(b"\0", position)) >= 0:
        stop = flags.find(b"\1", first)
        position = len(flags) if stop < 0 else stop
        yield first, position


_ABSENT_IS_ZERO = bytes(int(value == _PRESENT) for value in range(256))


def in_order(pieces: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The same bytes in larger pieces that begin at whole grains wherever the ones before them end there."""
    held = bytearray()
    start = 0
    for offset, piece in pieces:
        if offset != start + len(held):
            if held:
                yield start, bytes(held)
            held, start = bytearray(), offset
        held += piece
        if len(held) >= _WRITE_SIZE:
            size = (start + len(held)) // GRAIN * GRAIN - start
            yield start, bytes(held[:size])
            del held[:size]
            start += size
    if held:
        yield start, bytes(held)
