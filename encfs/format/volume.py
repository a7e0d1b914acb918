"""Read a volume: any byte range of the plaintext image, every frame checked against the root before it is used.

Stored bytes are read into private memory once; that copy is hashed, decrypted and decompressed. Consecutive frames
are read in one piece. Frames that a caller asks for in part are kept in a small bounded cache.

Not here: sequential read-ahead (`readahead`), what the image means (`encfs.erofs`), fetching and ciphertext caches
(`encfs.oci`).
"""

from __future__ import annotations

import hmac
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from encfs.errors import EncfsError, FormatError, IntegrityError
from encfs.format.descriptor import VolumeDescriptor
from encfs.format.frames import FrameCipher, FrameGeometry
from encfs.format.suite import Suite
from encfs.format.tree import FrameLocation, TreeReader, leaf_hash
from encfs.oci.blobs import Blob

#: Bytes of plaintext frames kept for reads smaller than a frame.
DEFAULT_CACHE_SIZE = 8 << 20
#: Stored bytes that are read in one piece at most; a larger frame is read alone.
_MAX_RUN = (1 << 20) + (64 << 10)


@dataclass(slots=True)
class VolumeStats:
    """Counters since opening. Bytes are of plaintext (`bytes_read`) and of stored frames (`bytes_fetched`)."""

    bytes_read: int = 0
    bytes_fetched: int = 0
    frames_verified: int = 0
    cache_hits: int = 0
    failures: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)


class _NotAtHandError(Exception):
    """A byte is neither in a cache nor readable without waiting. Never leaves this module."""


class StoredRun(NamedTuple):
    """Consecutive frames that lie side by side in one segment. A tuple: one is made for every small read."""

    segment: int
    offset: int
    size: int
    first: int
    locations: Sequence[FrameLocation]


class VolumeReader:
    """Random access to one volume. Thread-safe. Owns its blobs and closes them."""

    def __init__(
        self,
        descriptor: VolumeDescriptor,
        suite: Suite,
        key: bytes | bytearray,
        tree: Blob,
        segments: Sequence[Blob],
        *,
        cache_size: int = DEFAULT_CACHE_SIZE,
        label: str = "",
    ) -> None:
        """`label` names the artifact in messages. Raises FormatError, IntegrityError as `TreeReader` does."""
        self.id = descriptor.id
        self.size = descriptor.size
        self.frame_size = descriptor.frame_size
        self.label = label or descriptor.id.hex()
        self.stats = VolumeStats()
        self._suite = suite
        self._geometry: FrameGeometry = descriptor.geometry
        self._cipher = FrameCipher(suite, descriptor.id, key)
        self._segments = tuple(segments)
        self._segment_sizes = tuple(segment.size for segment in descriptor.segments)
        self._tree = TreeReader(descriptor.root_input(suite), descriptor.root, tree)
        self._cache: OrderedDict[int, memoryview] = OrderedDict()
        self._cache_frames = max(4, cache_size // descriptor.frame_size)
        self._lock = threading.Lock()
        self._scratch = threading.local()

    # -- the public calls

    def read(self, offset: int, size: int) -> memoryview:
        """Verified bytes of the image, fewer only at its end. The view may belong to the cache: do not write to it.

        Raises: IntegrityError, FormatError where the stored bytes are not what the root commits to; what a blob raises.
        """
        size = self._clamp(offset, size)
        index, start = divmod(offset, self.frame_size)
        if 0 < size <= self.frame_size - start:
            view = self._frame(index, wait=True)[start : start + size]
            with self._lock:
                self.stats.bytes_read += size
            return view
        buffer = memoryview(bytearray(size))
        self.read_into(offset, buffer)
        return buffer.toreadonly()

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` with verified bytes from `offset`; the number of bytes, fewer only at the end of the image.

        On failure the whole of `buffer` is wiped. Raises: as `read`.
        """
        size = self._clamp(offset, len(buffer))
        try:
            self._fill(offset, buffer[:size], wait=True)
        except BaseException:
            buffer[:] = bytes(len(buffer))
            raise
        return size

    def try_read_into(self, offset: int, buffer: memoryview) -> int | None:
        """The same if no disk or network has to be waited for; otherwise None, and `buffer` is undefined."""
        size = self._clamp(offset, len(buffer))
        try:
            self._fill(offset, buffer[:size], wait=False)
        except _NotAtHandError:
            return None
        except BaseException:
            buffer[:] = bytes(len(buffer))
            raise
        return size

    def close(self) -> None:
        """Close the blobs and forget cached plaintext."""
        with self._lock:
            self._cache.clear()
        self._tree.close()
        for segment in self._segments:
            segment.close()

    # -- stored bytes, for who fetches them before they are asked for

    def stored_runs(self, offset: int, size: int, limit: int) -> Iterator[StoredRun]:
        """Where the frames of a range lie, in pieces of at most `limit` bytes or one frame. May wait for the tree.

        Raises: as `read`.
        """
        size = self._clamp(offset, size)
        index, stop = offset // self.frame_size, -(-(offset + size) // self.frame_size)
        while index < stop:
            run = self._next_run(index, stop, wait=True, limit=limit)
            yield run
            index += len(run.locations)

    def stored_blob(self, run: StoredRun) -> Blob:
        """The blob in which a run lies."""
        return self._segments[run.segment]

    @property
    def tree_blob(self) -> Blob:
        """The tree as it is stored."""
        return self._tree.blob

    @property
    def stored_size(self) -> int:
        """Bytes of tree and segments."""
        return self._tree.blob.size + sum(self._segment_sizes)

    def check_run(self, run: StoredRun) -> int:
        """Check the stored bytes of frames against the root, without decrypting them; wrong ones are fetched anew once.

        Returns how many frames were wrong at first. Raises: as `read`.
        """
        stored = self._read_stored(run, wait=True)
        wrong = start = 0
        for index, location in enumerate(run.locations, run.first):
            frame = stored[start : start + location.stored]
            try:
                wrong += self._check_leaf(index, location, frame, wait=True)
            except EncfsError as error:
                raise self._failed(index, error) from None
            start += location.stored
        with self._lock:
            self.stats.frames_verified += len(run.locations)
        return wrong

    # -- frames into a buffer

    def _clamp(self, offset: int, size: int) -> int:
        if offset < 0 or size < 0:
            raise ValueError("offset and size of a read are not negative")
        return max(0, min(size, self.size - offset))

    def _fill(self, offset: int, buffer: memoryview, *, wait: bool) -> None:
        if not buffer:
            return
        frame_size = self.frame_size
        position, end = offset, offset + len(buffer)
        index, start = divmod(position, frame_size)
        if start and position < end:
            position += self._copy_part(index, start, buffer, wait=wait)
            index += 1
        # Frames that are wanted whole go straight into the buffer; the image's last frame may be short.
        stop = self._geometry.count if end == self.size else end // frame_size
        if index < stop:
            whole = buffer[position - offset : min(stop * frame_size, end) - offset]
            self._open_frames(index, stop, whole, wait=wait)
            position += len(whole)
            index = stop
        if position < end:
            self._copy_part(index, 0, buffer[position - offset :], wait=wait)
        with self._lock:
            self.stats.bytes_read += len(buffer)

    def _copy_part(self, index: int, start: int, buffer: memoryview, *, wait: bool) -> int:
        part = self._frame(index, wait=wait)[start : start + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def _frame(self, index: int, *, wait: bool) -> memoryview:
        """One whole frame, from the cache or opened into it."""
        cached = self._cache.get(index)
        if cached is not None:
            with self._lock:
                self.stats.cache_hits += 1
                if index in self._cache:
                    self._cache.move_to_end(index)
            return cached
        plain = memoryview(bytearray(self._geometry.length(index)))
        self._open_frames(index, index + 1, plain, wait=wait)
        plain = plain.toreadonly()
        with self._lock:
            self._cache[index] = plain
            while len(self._cache) > self._cache_frames:
                self._cache.popitem(last=False)
        return plain

    def _open_frames(self, first: int, stop: int, buffer: memoryview, *, wait: bool) -> None:
        """Read, check and decrypt frames `first`…`stop` into `buffer`, which is exactly as long as they are."""
        index, position = first, 0
        while index < stop:
            run = self._next_run(index, stop, wait=wait)
            position = self._open_run(run, buffer, position, wait=wait)
            index += len(run.locations)

    def _next_run(self, first: int, stop: int, *, wait: bool, limit: int = _MAX_RUN) -> StoredRun:
        """As many of the frames as lie side by side in one segment, up to a bounded number of bytes."""
        locations: list[FrameLocation] = []
        end = 0
        for index in range(first, stop):
            location = self._locate(index, wait=wait)
            if locations and (
                location.segment != locations[0].segment
                or location.offset != end
                or end - locations[0].offset + location.stored > limit
            ):
                break
            locations.append(location)
            end = location.offset + location.stored
        return StoredRun(locations[0].segment, locations[0].offset, end - locations[0].offset, first, locations)

    def _locate(self, index: int, *, wait: bool) -> FrameLocation:
        try:
            location = self._tree.locate(index, wait=wait)
        except EncfsError as error:
            raise self._failed(index, error) from None
        if location is None:
            raise _NotAtHandError
        if not location.is_possible(self._segment_sizes, self._geometry.length(index)):
            raise self._failed(index, FormatError("its tree entry is out of bounds"))
        return location

    def _read_stored(self, run: StoredRun, *, wait: bool) -> memoryview:
        """The stored bytes of a run in this thread's buffer."""
        stored = self._scratch_buffer(run.size)
        segment = self._segments[run.segment]
        try:
            if wait:
                segment.read_into(run.offset, stored)
            elif not segment.try_read_into(run.offset, stored):
                raise _NotAtHandError
        except EncfsError as error:
            raise self._failed(run.first, error) from None
        return stored

    def _open_run(self, run: StoredRun, buffer: memoryview, position: int, *, wait: bool) -> int:
        stored = self._read_stored(run, wait=wait)
        start = 0
        for index, location in enumerate(run.locations, run.first):
            length = self._geometry.length(index)
            frame = stored[start : start + location.stored]
            self._open_frame(index, location, frame, buffer[position : position + length], wait=wait)
            start += location.stored
            position += length
        with self._lock:
            self.stats.frames_verified += len(run.locations)
            self.stats.bytes_fetched += run.size
        return position

    def _open_frame(
        self, index: int, location: FrameLocation, stored: memoryview, out: memoryview, *, wait: bool
    ) -> None:
        """Check one frame against its leaf and decrypt it."""
        try:
            self._check_leaf(index, location, stored, wait=wait)
            self._cipher.open_into(index, stored, len(out), location.flags, out)
        except EncfsError as error:
            raise self._failed(index, error) from None

    def _check_leaf(self, index: int, location: FrameLocation, stored: memoryview, *, wait: bool) -> bool:
        """Check stored bytes; a copy that does not fit is fetched anew once, into `stored`. Whether that was needed.

        Raises: IntegrityError, what the segment raises; _NotAtHandError.
        """
        if hmac.compare_digest(leaf_hash(self._suite, index, stored), location.leaf):
            return False
        segment = self._segments[location.segment]
        if not segment.discard(location.offset, location.stored):
            raise IntegrityError("its stored bytes are not what the root commits to")
        if not wait:
            raise _NotAtHandError
        segment.read_into(location.offset, stored)
        if not hmac.compare_digest(leaf_hash(self._suite, index, stored), location.leaf):
            segment.discard(location.offset, location.stored)
            raise IntegrityError("its stored bytes are not what the root commits to")
        return True

    def _scratch_buffer(self, size: int) -> memoryview:
        """This thread's buffer for stored bytes: fresh memory for every read costs more than hashing it."""
        buffer: memoryview | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size:
            buffer = self._scratch.buffer = memoryview(bytearray(max(size, _MAX_RUN)))
        return buffer[:size]

    def _failed(self, index: int, error: EncfsError) -> EncfsError:
        """The same error, naming volume and frame; counted."""
        with self._lock:
            self.stats.failures += 1
        return type(error)(f"{self.label}: frame {index}: {error.message}", hint=error.hint)
