"""Seal a plaintext image into segments and a tree, in one pass, with bounded memory.

The producer fills plaintext batches; a pool of threads compresses, seals and hashes them (all of which release the
GIL); one more thread writes what is sealed, in order, to the sink. Each frame index is sealed exactly once under the
volume's fresh key: whether to compress is decided first, and frame 0, whose head the producer may still set
(`set_head`), is sealed last. No key is kept to resume an interrupted encryption.

Not here: what the image contains (`encfs.erofs.writer`), the descriptor (`descriptor`).
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from encfs.errors import UnsupportedError
from encfs.format.descriptor import SEGMENT_TYPE, TREE_TYPE, SegmentDescriptor, VolumeDescriptor
from encfs.format.frames import (
    DEFAULT_FRAME_SIZE,
    FLAG_ZSTD,
    TAG_SIZE,
    FrameCipher,
    FrameGeometry,
    check_frame_size,
    compress_body,
)
from encfs.format.suite import BLAKE3, KEY_SIZE, VOLUME_ID_SIZE, Suite
from encfs.format.tree import (
    ENTRY_SIZE,
    MAX_FRAMES,
    MAX_SEGMENTS,
    FrameLocation,
    RootInput,
    leaf_hash,
    pack_entry,
    write_tree,
)
from encfs.keys.payload import VolumeSecret
from encfs.oci.blobs import BlobSink, BlobWriter, Buffer

DEFAULT_SEGMENT_SIZE = 1 << 30
MIN_SEGMENT_SIZE = 8 << 20
#: Bytes at the beginning of the image that `set_head` may replace.
MAX_HEAD_SIZE = 4096

_BATCH_SIZE = 4 << 20
_ZSTD_LEVEL = 3
#: Level-0 entries are spooled in memory up to this many bytes, then in a file; they are public.
_SPOOL_SIZE = 8 << 20


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """How a volume is written. Sizes in bytes."""

    suite: Suite = BLAKE3
    frame_size: int = DEFAULT_FRAME_SIZE
    segment_size: int = DEFAULT_SEGMENT_SIZE
    compress: bool = False
    kind: str = "erofs"
    name: str = ""


@dataclass(frozen=True, slots=True)
class WrittenVolume:
    """What `VolumeWriter.finish` gives: the public descriptor and the secret that belongs to it."""

    descriptor: VolumeDescriptor
    secret: VolumeSecret


@dataclass(slots=True)
class _Batch:
    """A reusable pair of buffers: plaintext of consecutive frames, and what they are sealed to."""

    plain: bytearray
    sealed: bytearray


@dataclass(frozen=True, slots=True)
class _SealedFrame:
    index: int
    start: int
    stored: int
    flags: int
    leaf: bytes


class VolumeWriter:
    """Write one volume: fill `buffer()`, `advance()`, and `finish()`. One producer thread; `abort()` on failure."""

    def __init__(self, sink: BlobSink, options: VolumeOptions) -> None:
        """Raises FormatError for a frame size out of bounds."""
        check_frame_size(options.frame_size)
        self._sink = sink
        self._options = options
        self._id = secrets.token_bytes(VOLUME_ID_SIZE)
        self._key = secrets.token_bytes(KEY_SIZE)
        self._cipher = FrameCipher(options.suite, self._id, self._key)
        self.position = 0
        self._frame_zero = bytearray()
        workers = min(8, os.cpu_count() or 1)
        self._frames_per_batch = max(1, _BATCH_SIZE // options.frame_size)
        self._free = deque(self._new_batch() for _ in range(workers + 2))
        self._batch = self._free.popleft()
        self._filled = 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="seal")
        self._output = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._pending: deque[tuple[_Batch, Future[None]]] = deque()
        self._per_thread = threading.local()
        self._entries = tempfile.SpooledTemporaryFile(max_size=_SPOOL_SIZE)  # noqa: SIM115 - closed by finish and abort
        self._entries.seek(ENTRY_SIZE)
        self._segments: list[SegmentDescriptor] = []
        self._segment: BlobWriter | None = None
        self._segment_size = 0
        self._segment_frames = 0

    def _new_batch(self) -> _Batch:
        size = self._options.frame_size
        return _Batch(bytearray(self._frames_per_batch * size), bytearray(self._frames_per_batch * (size + TAG_SIZE)))

    # -- producing the image

    def buffer(self) -> memoryview:
        """Writable room that follows `position`, never empty; fill it from its start, then `advance`."""
        if self._filled == len(self._batch.plain):
            self._submit()
        return memoryview(self._batch.plain)[self._filled :]

    def advance(self, size: int) -> None:
        """The first `size` bytes of `buffer()` are part of the image now."""
        self._filled += size
        self.position += size

    def write(self, data: Buffer) -> None:
        """Append a copy of `data`."""
        view = memoryview(data).cast("B")
        while view:
            room = self.buffer()
            size = min(len(room), len(view))
            room[:size] = view[:size]
            self.advance(size)
            view = view[size:]

    def set_head(self, data: bytes) -> None:
        """Replace the first bytes of the image, which must have been written already."""
        if len(data) > min(MAX_HEAD_SIZE, self.position):
            raise ValueError(f"the head of an image is at most {MAX_HEAD_SIZE} bytes that were written before")
        target = self._frame_zero or self._batch.plain
        target[: len(data)] = data

    # -- sealing, in the pool

    def _submit(self) -> None:
        """Hand the filled batch to the pool and take a free one; waits for the oldest where there is none."""
        batch, filled = self._batch, self._filled
        frame_size = self._options.frame_size
        first = (self.position - filled) // frame_size
        if self.position > MAX_FRAMES * frame_size:
            raise UnsupportedError(
                f"the volume needs more than {MAX_FRAMES} frames", hint="choose a larger --frame-size"
            )
        start = 0
        if first == 0:
            # Frame 0 is sealed last: its head is known only at the end.
            self._frame_zero = bytearray(memoryview(batch.plain)[: min(filled, frame_size)])
            start = 1
        lengths = [min(frame_size, filled - offset) for offset in range(0, filled, frame_size)]
        sealing = self._pool.submit(self._seal, batch, first, lengths, start)
        self._pending.append((batch, self._output.submit(self._store, batch, sealing)))
        if not self._free:
            self._wait_for_oldest()
        self._batch = self._free.popleft()
        self._filled = 0

    def _wait_for_oldest(self) -> None:
        batch, done = self._pending.popleft()
        done.result()
        self._free.append(batch)

    def _seal(self, batch: _Batch, first: int, lengths: Sequence[int], start: int) -> list[_SealedFrame]:
        """Seal frames `start`… of a batch one after the other into its second buffer."""
        plain, sealed = memoryview(batch.plain), memoryview(batch.sealed)
        frames: list[_SealedFrame] = []
        position = 0
        for number in range(start, len(lengths)):
            offset = number * self._options.frame_size
            frame = self._seal_frame(
                first + number, plain[offset : offset + lengths[number]], sealed[position:], position
            )
            frames.append(frame)
            position += frame.stored
        return frames

    def _seal_frame(self, index: int, plaintext: memoryview, room: memoryview, start: int) -> _SealedFrame:
        length, flags = len(plaintext), 0
        if self._options.compress:
            body = compress_body(plaintext, self._compressor())
            if body is not None:
                plaintext, flags = memoryview(body), FLAG_ZSTD
        out = room[: len(plaintext) + TAG_SIZE]
        self._cipher.seal_into(index, plaintext, length, flags, out)
        return _SealedFrame(index, start, len(out), flags, leaf_hash(self._options.suite, index, out))

    def _compressor(self) -> zstandard.ZstdCompressor:
        try:
            return self._per_thread.compressor  # type: ignore[no-any-return]
        except AttributeError:
            self._per_thread.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
            return self._per_thread.compressor  # type: ignore[no-any-return]

    # -- storing, in one thread, in order

    def _store(self, batch: _Batch, sealing: Future[list[_SealedFrame]]) -> None:
        self._store_frames(sealing.result(), memoryview(batch.sealed))

    def _store_frames(self, frames: Sequence[_SealedFrame], sealed: memoryview) -> None:
        """Append sealed frames to the current segment in as few writes as the segment size allows."""
        begin = end = 0
        for frame in frames:
            if self._segment is not None and self._segment_size + frame.stored > self._options.segment_size:
                self._segment.write(sealed[begin:end])
                begin = end
                self._close_segment()
            if self._segment is None:
                self._open_segment()
            location = FrameLocation(frame.leaf, self._segment_size, frame.stored, len(self._segments), frame.flags)
            self._write_entry(frame.index, pack_entry(location))
            self._segment_size += frame.stored
            self._segment_frames += 1
            end += frame.stored
        if self._segment is not None and end > begin:
            self._segment.write(sealed[begin:end])

    def _write_entry(self, index: int, entry: bytes) -> None:
        # Every frame but 0 comes in order; the spool starts behind the place of entry 0.
        if index == 0:
            self._entries.seek(0)
        self._entries.write(entry)

    def _open_segment(self) -> None:
        if len(self._segments) == MAX_SEGMENTS:
            raise UnsupportedError(
                f"the volume needs more than {MAX_SEGMENTS} segments", hint="choose a larger --segment-size"
            )
        self._segment = self._sink.create_blob()
        self._segment_size = self._segment_frames = 0

    def _close_segment(self) -> None:
        assert self._segment is not None  # noqa: S101 - only called with one open
        blob = self._segment.commit(SEGMENT_TYPE)
        self._segment = None
        self._segments.append(SegmentDescriptor(blob.digest, blob.size, self._segment_frames))

    # -- the end

    def finish(self) -> WrittenVolume:
        """Seal what is left, frame 0 last, write the tree, and describe the volume."""
        if self._filled:
            self._submit()
        while self._pending:
            self._wait_for_oldest()
        if self._frame_zero:
            room = memoryview(bytearray(len(self._frame_zero) + TAG_SIZE))
            frame = self._seal_frame(0, memoryview(self._frame_zero), room, 0)
            self._output.submit(self._store_frames, [frame], room).result()
            self._frame_zero[:] = bytes(len(self._frame_zero))
        if self._segment is not None:
            self._output.submit(self._close_segment).result()
        self._stop_threads()
        geometry = FrameGeometry(self.position, self._options.frame_size)
        tree, root = self._write_tree(geometry)
        descriptor = VolumeDescriptor(
            id=self._id,
            kind=self._options.kind,
            size=geometry.size,
            frame_size=geometry.frame_size,
            frames=geometry.count,
            root=root,
            tree_digest=tree[0],
            tree_size=tree[1],
            segments=tuple(self._segments),
        )
        return WrittenVolume(descriptor, VolumeSecret(self._id, self._key, self._options.name))

    def _write_tree(self, geometry: FrameGeometry) -> tuple[tuple[str, int], bytes]:
        fields = RootInput(
            self._options.suite,
            self._id,
            geometry.frame_size,
            geometry.size,
            geometry.count,
            [segment.size for segment in self._segments],
        )
        writer = self._sink.create_blob()
        try:
            leaves: BinaryIO = self._entries  # type: ignore[assignment]
            root = write_tree(fields, leaves, writer)
            blob = writer.commit(TREE_TYPE)
        finally:
            writer.abort()
            self._entries.close()
        return (blob.digest, blob.size), root

    def abort(self) -> None:
        """Throw away what was written and end the threads; harmless after `finish`."""
        self._stop_threads()
        if self._segment is not None:
            self._segment.abort()
            self._segment = None
        self._entries.close()

    def _stop_threads(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._output.shutdown(cancel_futures=True)
