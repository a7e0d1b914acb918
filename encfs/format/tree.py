"""The hash tree over a volume's stored frames: node geometry, building, and path checks on reading.

Level 0 holds an entry for every frame (what its stored bytes hash to and where they lie); every level above holds the
hashes of the nodes below, 128 to a node, up to a single top node that the root commits to. The blob stores the levels
from the top down, so that the first bytes of it serve a mount (format.md, "Tree").

Not here: reading or decrypting frames (`volume`), checking a whole artifact (`verification`).
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from encfs.errors import FormatError, IntegrityError
from encfs.format.frames import KNOWN_FLAGS, stored_size_is_possible
from encfs.format.suite import HASH_SIZE, Suite
from encfs.oci.blobs import Blob, BlobWriter

#: Entries in a full node.
FANOUT = 128
#: Frames in one volume at most: the hashes of level 1 stay below 64 MiB while a tree is built.
MAX_FRAMES = 1 << 28
#: Segments in one volume at most: the width of an entry's field.
MAX_SEGMENTS = 1 << 16

#: Entry of level 0: leaf hash, offset in the segment, stored size, segment number, flags. Big-endian.
_ENTRY = struct.Struct(">32s Q I H H")
ENTRY_SIZE = _ENTRY.size

# What is hashed ends in a fixed-width part whose last byte tells leaf, node and root apart. At the end, and not at the
# beginning, because BLAKE3 hashes a buffer that starts at a chunk boundary twice as fast (docs/decisions/0001).
_LEAF_SUFFIX = struct.Struct(">Q B")
_NODE_SUFFIX = struct.Struct(">B Q B")
_LEAF, _NODE, _ROOT = 0x00, 0x01, 0x02
#: Root: top node, suite number, volume id, frame size, size, frames, number of segments; then sizes and the marker.
_ROOT_FIELDS = struct.Struct(">32s B 16s I Q Q I")
_SEGMENT_SIZE = struct.Struct(">Q")

#: How many bytes of the tree blob are read at once at opening, and how many level-0 nodes on a miss.
_FIRST_READ = 64 << 10
_NODES_PER_READ = 8
#: Bound of the cache of checked nodes: 1024 nodes of level 0 are 6 MiB and cover 8 GiB at 64 KiB frames.
_CACHED_NODES = 1024


class FrameLocation(NamedTuple):
    """One entry of level 0."""

    leaf: bytes
    offset: int
    stored: int
    segment: int
    flags: int

    def is_possible(self, segment_sizes: Sequence[int], length: int) -> bool:
        """Whether it lies within its segment, and can be of a frame of `length` plaintext bytes (format.md, "Tree")."""
        return (
            self.segment < len(segment_sizes)
            and self.offset + self.stored <= segment_sizes[self.segment]
            and not self.flags & ~KNOWN_FLAGS
            and stored_size_is_possible(self.stored, length, self.flags)
        )


@dataclass(frozen=True, slots=True)
class Level:
    """One level: entries below it, its nodes, and where it starts in the blob (bytes)."""

    number: int
    entries: int
    entry_size: int
    offset: int

    @property
    def nodes(self) -> int:
        return max(1, -(-self.entries // FANOUT))

    @property
    def size(self) -> int:
        return self.entries * self.entry_size

    def span(self, node: int) -> tuple[int, int]:
        """Offset in the blob and size in bytes of a node; only the last of a level may be partial."""
        full = FANOUT * self.entry_size
        start = node * full
        return self.offset + start, min(full, self.size - start)


@dataclass(frozen=True, slots=True)
class TreeGeometry:
    """Everything about a tree's shape, from the number of frames alone. `levels[0]` are the leaves."""

    frames: int
    levels: tuple[Level, ...]
    size: int

    @classmethod
    def of(cls, frames: int) -> TreeGeometry:
        """Raises FormatError for more frames than a volume may have."""
        if not 0 <= frames <= MAX_FRAMES:
            raise FormatError(f"a volume of {frames} frames is out of bounds (at most {MAX_FRAMES})")
        counts = [frames]
        while counts[-1] > FANOUT:
            counts.append(-(-counts[-1] // FANOUT))
        offset = 0
        levels: list[Level] = []
        for number in reversed(range(len(counts))):
            level = Level(number, counts[number], ENTRY_SIZE if number == 0 else HASH_SIZE, offset)
            levels.append(level)
            offset += level.size
        return cls(frames, tuple(reversed(levels)), offset)


@dataclass(frozen=True, slots=True)
class RootInput:
    """What the root commits to besides the top node. Sizes in bytes."""

    suite: Suite
    volume_id: bytes
    frame_size: int
    size: int
    frames: int
    segment_sizes: Sequence[int]


def leaf_hash(suite: Suite, index: int, stored: bytes | memoryview) -> bytes:
    """H(ciphertext || tag || index u64 || 0x00): over the whole ciphertext, since tags alone commit to nothing."""
    hasher = suite.new_hash(stored)
    hasher.update(_LEAF_SUFFIX.pack(index, _LEAF))
    return hasher.digest()


def node_hash(suite: Suite, level: int, index: int, entries: bytes | memoryview) -> bytes:
    """H(entries || level u8 || index u64 || 0x01)."""
    hasher = suite.new_hash(entries)
    hasher.update(_NODE_SUFFIX.pack(level, index, _NODE))
    return hasher.digest()


def root_hash(fields: RootInput, top: bytes) -> bytes:
    """H(top node || suite || volume id || frame size || size || frames || segments || their sizes || 0x02)."""
    hasher = fields.suite.new_hash(
        _ROOT_FIELDS.pack(
            top,
            fields.suite.number,
            fields.volume_id,
            fields.frame_size,
            fields.size,
            fields.frames,
            len(fields.segment_sizes),
        )
    )
    hasher.update(b"".join(map(_SEGMENT_SIZE.pack, fields.segment_sizes)) + bytes([_ROOT]))
    return hasher.digest()


def pack_entry(location: FrameLocation) -> bytes:
    """The bytes of a level-0 entry."""
    return _ENTRY.pack(*location)


def write_tree(fields: RootInput, leaves: BinaryIO, writer: BlobWriter) -> bytes:
    """Write the tree blob from its level-0 entries (in index order, from the start of `leaves`); returns the root.

    Memory: the levels above level 0, 1/192 of the tree.
    """
    geometry = TreeGeometry.of(fields.frames)
    upper: list[bytes] = []
    below = b"".join(
        node_hash(fields.suite, 0, index, entries) for index, entries in enumerate(_node_entries(leaves, geometry))
    )
    for level in geometry.levels[1:]:
        upper.append(below)
        view = memoryview(below)
        step = FANOUT * HASH_SIZE
        below = b"".join(
            node_hash(fields.suite, level.number, node, view[node * step : (node + 1) * step])
            for node in range(level.nodes)
        )
    for content in reversed(upper):
        writer.write(content)
    for entries in _node_entries(leaves, geometry):
        writer.write(entries)
    return root_hash(fields, below)


def _node_entries(leaves: BinaryIO, geometry: TreeGeometry) -> Iterator[bytes]:
    level = geometry.levels[0]
    leaves.seek(0)
    for node in range(level.nodes):
        _, size = level.span(node)
        entries = leaves.read(size)
        if len(entries) != size:
            raise FormatError("the spool of tree entries is shorter than the number of frames")
        yield entries


class TreeReader:
    """Looks entries up in an untrusted tree blob, checking the path to the root. Thread-safe; O(1) at opening."""

    def __init__(self, fields: RootInput, root: bytes, blob: Blob) -> None:
        """Raises FormatError where the blob's size is not the tree's, IntegrityError where the top does not fit."""
        self._suite = fields.suite
        self.blob = blob
        self.geometry = TreeGeometry.of(fields.frames)
        if blob.size != self.geometry.size:
            raise FormatError(f"the tree has {blob.size} bytes, {fields.frames} frames need {self.geometry.size}")
        self._top = (len(self.geometry.levels) - 1, 0)
        self._leaves: dict[int, bytes] = {}
        self._inner: dict[tuple[int, int], bytes] = {}
        self._lock = threading.Lock()
        top_level = self.geometry.levels[-1]
        first = self._first_read()
        if not self._is_top(first, fields, root) and blob.discard(0, len(first)):
            first = self._first_read()  # another copy may be right
        if not self._is_top(first, fields, root):
            blob.discard(0, len(first))
            raise IntegrityError("the tree does not belong to the root in the descriptor")
        self._store(top_level.number, 0, first[: top_level.size])
        self._take_whole_levels(first)

    def _first_read(self) -> bytes:
        content = bytearray(min(_FIRST_READ, self.geometry.size))
        if content:
            self.blob.read_into(0, memoryview(content))
        return bytes(content)

    def _is_top(self, first: bytes, fields: RootInput, root: bytes) -> bool:
        """Whether the first read begins with the node that the root commits to; one is never larger than that."""
        level = self.geometry.levels[-1]
        return root_hash(fields, node_hash(self._suite, level.number, 0, first[: level.size])) == root

    def _take_whole_levels(self, first: bytes) -> None:
        """Keep the nodes that the first read brought along, so that a mount asks the store for fewer.

        Up to one that is wrong: what comes then is asked for when it is needed, and told or mended then.
        """
        for level in reversed(self.geometry.levels[:-1]):
            for node in range(level.nodes):
                offset, size = level.span(node)
                if offset + size > len(first):
                    return
                entries = first[offset : offset + size]
                if node_hash(self._suite, level.number, node, entries) != self._expected(level.number, node, wait=True):
                    return
                self._store(level.number, node, entries)

    def locate(self, index: int, *, wait: bool = True) -> FrameLocation | None:
        """The checked entry of frame `index`; None only with `wait=False`, where a node is not at hand.

        Raises: IntegrityError where a node on the path is not what its parent says; what the blob raises.
        """
        entries = self._leaves.get(index // FANOUT)
        if entries is None:
            entries = self._load(0, index // FANOUT, wait=wait)
            if entries is None:
                return None
        return FrameLocation._make(_ENTRY.unpack_from(entries, index % FANOUT * ENTRY_SIZE))

    def _load(self, level_number: int, node: int, *, wait: bool) -> bytes | None:
        """A checked node: from the cache, or fetched together with some of its right-hand neighbours."""
        known = self._leaves.get(node) if level_number == 0 else self._inner.get((level_number, node))
        if known is not None:
            return known
        if self._expected(level_number, node, wait=wait) is None:
            return None
        level = self.geometry.levels[level_number]
        # Neighbours share the parent that was just checked.
        stop = min(node + _NODES_PER_READ, (node // FANOUT + 1) * FANOUT, level.nodes)
        content = self._fetch_nodes(level, node, stop, wait=wait)
        if content is None:
            return None
        start_offset, _ = level.span(node)
        result: bytes | None = None
        for neighbour in range(node, stop):
            offset, size = level.span(neighbour)
            entries = content[offset - start_offset : offset - start_offset + size]
            expected = self._expected(level_number, neighbour, wait=wait)
            if expected is None or len(entries) < size:
                break
            if neighbour == node:
                entries = self._checked_or_refetched(level_number, node, entries, expected)
                result = entries
            elif node_hash(self._suite, level_number, neighbour, entries) != expected:
                break  # reported when that node is asked for
            self._store(level_number, neighbour, entries)
        return result

    def _checked_or_refetched(self, level_number: int, node: int, entries: bytes, expected: bytes) -> bytes:
        offset, size = self.geometry.levels[level_number].span(node)
        if node_hash(self._suite, level_number, node, entries) != expected and self.blob.discard(offset, size):
            fresh = self._fetch(offset, size, wait=True)
            assert fresh is not None  # noqa: S101 - waiting reads always give bytes
            entries = fresh
        self._check(level_number, node, entries, expected)
        return entries

    def _expected(self, level_number: int, node: int, *, wait: bool) -> bytes | None:
        """What a node below the top must hash to, by its checked parent."""
        parent = self._load(level_number + 1, node // FANOUT, wait=wait)
        if parent is None:
            return None
        slot = node % FANOUT * HASH_SIZE
        return parent[slot : slot + HASH_SIZE]

    def _check(self, level_number: int, node: int, entries: bytes, expected: bytes | None) -> None:
        if node_hash(self._suite, level_number, node, entries) != expected:
            raise IntegrityError(f"tree node {node} of level {level_number} is not what the root commits to")

    def _fetch_nodes(self, level: Level, node: int, stop: int, *, wait: bool) -> bytes | None:
        """The content of nodes up to `stop`; of the first alone where it is at hand, and the others are not."""
        offset, first_size = level.span(node)
        last_offset, last_size = level.span(stop - 1)
        size = last_offset + last_size - offset
        content = self._fetch(offset, size, wait=False) or self._fetch(offset, first_size, wait=False)
        return self._fetch(offset, size, wait=True) if content is None and wait else content

    def _fetch(self, offset: int, size: int, *, wait: bool) -> bytes | None:
        content = bytearray(size)
        if wait:
            self.blob.read_into(offset, memoryview(content))
        elif not self.blob.try_read_into(offset, memoryview(content)):
            return None
        return bytes(content)

    def _store(self, level_number: int, node: int, entries: bytes) -> None:
        """Keep a checked node; the oldest goes where there are too many, but never the top."""
        with self._lock:
            if level_number == 0:
                self._leaves[node] = entries
                if len(self._leaves) > _CACHED_NODES:
                    del self._leaves[next(iter(self._leaves))]
            else:
                self._inner[level_number, node] = entries
                if len(self._inner) > _CACHED_NODES:
                    del self._inner[next(key for key in self._inner if key != self._top)]

    def close(self) -> None:
        self.blob.close()
