"""Check a whole volume without any key: every node, every frame, and that the frames tile the segments exactly.

One pass: the stored bytes are read once, in the order of the frames, and hashed both for the tree and for the blobs'
digests. Memory does not grow with the volume. Not here: random access (`volume`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from encfs.encoding import parse_digest
from encfs.errors import FormatError, IntegrityError
from encfs.format.descriptor import VolumeDescriptor
from encfs.format.suite import Suite
from encfs.format.tree import FrameLocation, TreeReader, leaf_hash
from encfs.oci.blobs import Blob
from encfs.progress import Progress

_READ_SIZE = 4 << 20
#: Runs of frames out of order that are remembered at most, in all segments of a volume together.
_MAX_SCATTERED = 1 << 20


@dataclass(frozen=True, slots=True)
class VolumeCheck:
    """What was checked: frames and stored bytes."""

    frames: int
    stored_size: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive frames that lie side by side."""

    first: int
    segment: int
    offset: int
    size: int
    locations: Sequence[FrameLocation]


def verify_volume(
    descriptor: VolumeDescriptor, suite: Suite, tree: Blob, segments: Sequence[Blob], progress: Progress
) -> VolumeCheck:
    """Raises: IntegrityError, FormatError at the first thing that is wrong; what the blobs raise."""
    _check_digest(tree, descriptor.tree_digest, "the tree")
    reader = TreeReader(descriptor.root_input(suite), descriptor.root, tree)
    scattered = _Scattered()
    checks = [
        _SegmentCheck(blob, item.digest, scattered) for blob, item in zip(segments, descriptor.segments, strict=True)
    ]
    buffers = [memoryview(bytearray(max(_READ_SIZE, descriptor.frame_size * 2))) for _ in range(2)]
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        pending: Future[None] | None = None
        for number, run in enumerate(_runs(descriptor, reader, len(buffers[0]))):
            stored = buffers[number % 2][: run.size]
            check = checks[run.segment]
            segments[run.segment].read_into(run.offset, stored)
            if pending is not None:
                pending.result()
            # The other hash runs beside this one; the buffer is not touched again before it is through.
            pending = pool.submit(check.take, run, stored)
            _check_leaves(suite, run, stored)
            progress.advance(run.size)
        if pending is not None:
            pending.result()
    for check, item in zip(checks, descriptor.segments, strict=True):
        check.finish()
        if item.frames != check.frames:
            raise FormatError(f"segment {item.digest} holds {check.frames} frames, the descriptor says {item.frames}")
    return VolumeCheck(descriptor.frames, descriptor.stored_size)


def _runs(descriptor: VolumeDescriptor, reader: TreeReader, limit: int) -> Iterator[_Run]:
    """The frames in order, in runs of at most `limit` stored bytes, each entry within the bounds of its segment."""
    sizes = [segment.size for segment in descriptor.segments]
    geometry = descriptor.geometry
    run: list[FrameLocation] = []
    first = end = 0
    for index in range(descriptor.frames):
        location = reader.locate(index)
        if location is None or not location.is_possible(sizes, geometry.length(index)):
            raise FormatError(f"the tree entry of frame {index} is out of bounds")
        if run and (
            location.segment != run[0].segment
            or location.offset != end
            or end - run[0].offset + location.stored > limit
        ):
            yield _Run(first, run[0].segment, run[0].offset, end - run[0].offset, run)
            run = []
        if not run:
            first = index
        run.append(location)
        end = location.offset + location.stored
    if run:
        yield _Run(first, run[0].segment, run[0].offset, end - run[0].offset, run)


def _check_leaves(suite: Suite, run: _Run, stored: memoryview) -> None:
    start = 0
    for index, location in enumerate(run.locations, run.first):
        if not hmac.compare_digest(leaf_hash(suite, index, stored[start : start + location.stored]), location.leaf):
            raise IntegrityError(f"the stored bytes of frame {index} are not what the root commits to")
        start += location.stored


class _Scattered:
    """How many runs out of order all segments of a volume remember."""

    def __init__(self) -> None:
        self.count = 0


class _SegmentCheck:
    """One segment's digest and tiling, fed with runs in the order of the frames."""

    def __init__(self, blob: Blob, digest: str, all_scattered: _Scattered) -> None:
        self._blob = blob
        self._digest = digest
        self.frames = 0
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._covered = 0
        self._scattered: dict[int, int] = {}
        self._all_scattered = all_scattered

    def take(self, run: _Run, stored: memoryview) -> None:
        self.frames += len(run.locations)
        start, end = run.offset, run.offset + run.size
        if start == self._hashed:
            self._hash.update(stored)
            self._hashed = end
        if start < self._covered or start in self._scattered:
            raise FormatError(f"frames {run.first} and others overlap in segment {self._digest}")
        if start > self._covered:
            self._scattered[start] = end
            self._all_scattered.count += 1
            if self._all_scattered.count > _MAX_SCATTERED:
                raise FormatError(f"the frames of segment {self._digest} are scattered beyond measure")
            return
        self._covered = end
        while self._covered in self._scattered:
            self._covered = self._scattered.pop(self._covered)
            self._all_scattered.count -= 1

    def finish(self) -> None:
        """What was skipped as out of order is read again for the digest: as a rule frame 0 alone."""
        if self._scattered or self._covered != self._blob.size:
            raise FormatError(f"the frames do not tile segment {self._digest}")
        _check_digest(self._blob, self._digest, "a segment", self._hash, self._hashed)


def _check_digest(blob: Blob, digest: str, what: str, hasher: hashlib._Hash | None = None, start: int = 0) -> None:
    hasher = hasher or hashlib.sha256()
    buffer = memoryview(bytearray(min(_READ_SIZE, max(1, blob.size - start))))
    while start < blob.size:
        part = buffer[: blob.size - start]
        blob.read_into(start, part)
        hasher.update(part)
        start += len(part)
    if not hmac.compare_digest(hasher.digest(), parse_digest(digest)):
        raise IntegrityError(f"{what} is not the blob {digest} that the descriptor names")
