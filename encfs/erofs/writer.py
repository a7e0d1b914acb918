"""Write an uncompressed EROFS image in one pass over its input.

File contents go straight to the sink in the order of `add`; metadata follows as one region when `finish` knows all of
it; the superblock is written into the reserved first block last of all. Memory does not grow with the number of files.

The image is a function of the entries, their order, and the options: no clock, no random number, nothing of the
machine. Not here: where entries come from, and whether a file changed while it was read (beyond its becoming shorter).
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from encfs.erofs.metadata import CHUNK_RUN, ROOT_NID, write_metadata
from encfs.erofs.sparse import plan_chunks
from encfs.erofs.spool import ROOT_ID, open_spool, storage_errors
from encfs.erofs.structures import (
    BLOCK_BITS,
    BLOCK_SIZE,
    EXTENDED_INODE,
    FILE_TYPES,
    INCOMPAT_CHUNKED,
    LAYOUT_CHUNKED,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    MAX_BLOCKS,
    MAX_NAME,
    MAX_PATH,
    MAX_TARGET,
    NANOSECONDS,
    NULL_BLOCK,
    TYPE_DIRECTORY,
    Superblock,
    encode_device,
    pack_superblock,
    printable,
)
from encfs.erofs.xattrs import encode_xattrs
from encfs.errors import SourceError

_ZEROS = bytes(1 << 16)
_MAX_SIZE = (1 << 63) - 1
_MAX_ID = (1 << 32) - 1
_SYNTHETIC_MODE = stat.S_IFDIR | 0o755
#: Numbers of directories are kept at hand by path, in about this much memory (bytes); any other is looked up.
_CACHE_SIZE = 4 << 20
_CACHE_OVERHEAD = 200

_SELECT_NAME = "SELECT inode, type FROM name WHERE parent = ? AND name = ?"
_INSERT_INODE = f"INSERT INTO inode VALUES ({'?, ' * 13}NULL)"  # noqa: S608 (placeholders only)


class ImageSink(Protocol):
    """Where an image goes: sequential, except that its head is set last."""

    @property
    def position(self) -> int:
        """Bytes written so far."""

    def buffer(self) -> memoryview:
        """Writable, non-empty room that follows `position`; valid until the next call of any other method."""

    def advance(self, size: int) -> None:
        """The first `size` bytes of `buffer()` are now part of the image."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append a copy of `data`."""

    def set_head(self, data: bytes) -> None:
        """Overwrite the first len(data) bytes, at most 4096, of the image."""


class DataSource(Protocol):
    """What file contents are read from: an unbuffered file, a BytesIO, ..."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill a part of `buffer` from its start; 0 at the end."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of an image.

    `path` is relative, without a leading slash; b"" is the root. `mode` is the whole `st_mode`, `rdev` as `os.makedev`
    has it, `target` where a symbolic link points. `link_to` makes the entry a further name of the inode of an earlier
    path, and everything else of it but `path` is ignored.
    """

    path: bytes
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    link_to: bytes | None = None


@dataclass(frozen=True, slots=True)
class ImageSummary:
    """What was written: `size` of the image, `data_size` of file contents without holes and padding (bytes)."""

    size: int
    inodes: int
    names: int
    data_size: int
    metadata_offset: int


class ErofsWriter:
    """Writes one image to a sink. Not thread-safe. A context manager: leaving it drops what `finish` did not write.

    `epoch` (seconds since 1970) is stored once: inodes with this very mtime take half the room. `synthesise_parents`
    makes directories that are implied but never added, and the root too, with mode 0755, owner 0 and mtime `epoch`;
    without it they are a SourceError.
    """

    def __init__(self, sink: ImageSink, *, uuid: bytes, epoch: int = 0, synthesise_parents: bool = False) -> None:
        if len(uuid) != 16:
            raise ValueError("a UUID has 16 bytes")
        if not 0 <= epoch <= _MAX_SIZE:
            raise ValueError("the epoch is a number of seconds from 1970 onwards")
        if sink.position:
            raise ValueError("an image begins at the start of its sink")
        self._sink = sink
        self._uuid = uuid
        self._epoch = epoch
        self._synthesise = synthesise_parents
        self._inodes = 1
        self._names = 1
        self._data_size = 0
        self._sparse = False
        self._directories: dict[bytes, int] = {}
        self._cached_size = 0
        self._spool = open_spool()
        self._insert_inode(ROOT_ID, None, b"")
        sink.write(bytes(BLOCK_SIZE))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the temporary database; harmless after `finish`."""
        self._spool.close()

    def add(
        self, entry: Entry, data: DataSource | None = None, extents: Sequence[tuple[int, int]] | None = None
    ) -> None:
        """Add one name; parents may come later.

        A regular file's contents are read from `data` now: the bytes of `extents` (offset, length), in order, the rest
        of the file being holes; without `extents` the whole file. After an error the image cannot be completed.

        Raises: SourceError naming the path where the entry cannot be represented, its path is there already, the target
        of a hard link is not there, or `data` ends early; StorageError; what the sink raises.
        """
        try:
            with storage_errors():
                if entry.link_to is not None:
                    self._add_link(entry.path, entry.link_to)
                else:
                    self._add_inode(entry, data, extents)
        except BaseException:
            # Half an entry may be noted: nothing can be finished any more.
            self.close()
            raise

    def finish(self) -> ImageSummary:
        """Write the metadata and the superblock, and close.

        Raises: SourceError for directories that are implied but were never added; StorageError; what the sink raises.
        """
        try:
            with storage_errors():
                self._complete_directories()
                metadata_offset = self._sink.position
                first_block = metadata_offset // BLOCK_SIZE
                blocks = first_block + write_metadata(self._spool, self._sink, first_block, self._epoch)
        finally:
            self.close()
        self._sink.set_head(
            pack_superblock(
                Superblock(
                    root_nid=ROOT_NID,
                    inodes=self._inodes,
                    epoch=self._epoch,
                    epoch_nsec=0,
                    blocks=blocks,
                    metadata_block=first_block,
                    xattr_block=0,
                    uuid=self._uuid,
                    incompatible=INCOMPAT_CHUNKED if self._sparse else 0,
                )
            )
        )
        return ImageSummary(blocks * BLOCK_SIZE, self._inodes, self._names, self._data_size, metadata_offset)

    # Names

    def _split(self, path: bytes) -> tuple[int, bytes]:
        """The number of the parent directory, which comes to be here if need be, and the name in it."""
        parent, slash, name = path.rpartition(b"/")
        if not name or name == b"." or name == b".." or (slash and not parent):
            raise SourceError(f"{printable(path)}: not a plain relative path")
        if len(name) > MAX_NAME:
            raise SourceError(f"{printable(path)}: name of {len(name)} bytes, the limit is {MAX_NAME}")
        if len(path) > MAX_PATH:
            raise SourceError(f"{printable(path[:MAX_NAME])}...: path of {len(path)} bytes, the limit is {MAX_PATH}")
        if b"\0" in name:
            raise SourceError(f"{printable(path)}: name with a NUL byte")
        return self._directory(parent), name

    def _directory(self, path: bytes) -> int:
        """The number of a directory; it and those above it are noted as implied where they are not there."""
        ends = []
        number = ROOT_ID
        known = path
        while known:
            cached = self._directories.get(known)
            if cached is not None:
                number = cached
                break
            ends.append(len(known))
            known, slash, _name = known.rpartition(b"/")
            if slash and not known:
                raise SourceError(f"{printable(path)}: not a plain relative path")
        if ends:
            start = len(known) + 1 if known else 0
            for end in reversed(ends):
                name = path[start:end]
                found = self._find_directory(path[:end], number, name)
                number = found or self._imply_directory(path[:end], number, name)
                start = end + 1
            self._remember(path, number)
        return number

    def _find(self, path: bytes) -> tuple[int, int] | None:
        """The number and type of what has been added at a path."""
        directory, _slash, name = path.rpartition(b"/")
        number = self._directories.get(directory)
        names = path.split(b"/") if number is None else [name]
        number = number or ROOT_ID
        kind = TYPE_DIRECTORY
        for name in names:
            row = self._spool.execute(_SELECT_NAME, (number, name)).fetchone()
            if row is None:
                return None
            number, kind = row
        return number, kind

    def _find_directory(self, path: bytes, parent: int, name: bytes) -> int | None:
        row = self._spool.execute(_SELECT_NAME, (parent, name)).fetchone()
        if row is None:
            return None
        if row[1] != TYPE_DIRECTORY:
            raise SourceError(f"{printable(path)}: something lies below it, but it is not a directory")
        return int(row[0])

    def _imply_directory(self, path: bytes, parent: int, name: bytes) -> int:
        if not name or name == b"." or name == b".." or len(name) > MAX_NAME or b"\0" in name:
            raise SourceError(f"{printable(path)}: not a plain relative path")
        number = self._new_inode()
        self._insert_inode(number, None, path)
        self._insert_name(path, parent, name, number, TYPE_DIRECTORY, owner=True)
        return number

    def _remember(self, path: bytes, number: int) -> None:
        self._cached_size += len(path) + _CACHE_OVERHEAD
        if self._cached_size > _CACHE_SIZE:
            self._directories.clear()
            self._cached_size = 0
        self._directories[path] = number

    def _insert_name(self, path: bytes, parent: int, name: bytes, number: int, kind: int, *, owner: bool) -> None:
        try:
            self._spool.execute("INSERT INTO name VALUES (?, ?, ?, ?, ?)", (parent, name, number, kind, owner))
        except sqlite3.IntegrityError:
            raise SourceError(f"{printable(path)}: given twice, or also as the directory of another entry") from None
        self._names += 1

    def _add_link(self, path: bytes, link_to: bytes) -> None:
        found = self._find(link_to)
        if found is None:
            raise SourceError(f"{printable(path)}: hard link to {printable(link_to)}, which was not added before it")
        number, kind = found
        if kind == TYPE_DIRECTORY:
            raise SourceError(f"{printable(path)}: hard link to the directory {printable(link_to)}")
        parent, name = self._split(path)
        self._insert_name(path, parent, name, number, kind, owner=False)
        self._spool.execute("UPDATE inode SET nlink = nlink + 1 WHERE id = ?", (number,))

    # Inodes

    def _new_inode(self) -> int:
        self._inodes += 1
        return self._inodes

    def _insert_inode(self, number: int, mode: int | None, tail: bytes) -> None:
        """A directory that is only implied so far; `tail` is its path."""
        values = (number, mode, 0, 0, self._epoch, 0, 0, 1, LAYOUT_PLAIN, 0, 0, b"", tail)
        self._spool.execute(_INSERT_INODE, values)

    def _add_inode(self, entry: Entry, data: DataSource | None, extents: Sequence[tuple[int, int]] | None) -> None:
        path, mode = entry.path, entry.mode
        kind = FILE_TYPES.get(stat.S_IFMT(mode))
        if kind is None or mode > 0xFFFF:
            raise SourceError(f"{printable(path)}: unknown kind of file, mode {mode:#o}")
        seconds, nanoseconds = divmod(entry.mtime_ns, NANOSECONDS)
        if not (0 <= entry.uid <= _MAX_ID and 0 <= entry.gid <= _MAX_ID and -_MAX_SIZE <= seconds <= _MAX_SIZE):
            raise SourceError(f"{printable(path)}: owner {entry.uid}:{entry.gid} or mtime out of range")
        xattrs = encode_xattrs(path, entry.xattrs)
        owner = (mode, entry.uid, entry.gid, seconds, nanoseconds)
        if kind == TYPE_DIRECTORY:
            self._add_directory(path, owner, xattrs)
            return
        if not path:
            raise SourceError("/: the root of an image is a directory")
        parent, name = self._split(path)
        number = self._new_inode()
        self._insert_name(path, parent, name, number, kind, owner=True)
        size, layout, start, extra, tail = 0, LAYOUT_PLAIN, 0, 0, b""
        if stat.S_ISREG(mode):
            size = entry.size
            if not 0 <= size <= _MAX_SIZE:
                raise SourceError(f"{printable(path)}: size {size} out of range")
            if size:
                layout, start, extra, tail = self._store_file(path, size, data, extents)
        elif stat.S_ISLNK(mode):
            size = len(entry.target)
            layout, start, extra, tail = self._store_target(path, entry.target, len(xattrs))
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            encoded = encode_device(entry.rdev)
            if encoded is None:
                raise SourceError(f"{printable(path)}: device number {entry.rdev:#x} does not fit 12 and 20 bits")
            start = encoded
        values = (number, *owner, size, 1, layout, start, extra, xattrs, tail)
        self._spool.execute(_INSERT_INODE, values)

    def _add_directory(self, path: bytes, owner: tuple[int, int, int, int, int], xattrs: bytes) -> None:
        number = ROOT_ID
        if path:
            parent, name = self._split(path)
            found = self._spool.execute(_SELECT_NAME, (parent, name)).fetchone()
            if found and found[1] == TYPE_DIRECTORY:
                number = found[0]
            else:
                number = self._new_inode()
                self._insert_name(path, parent, name, number, TYPE_DIRECTORY, owner=True)
                self._insert_inode(number, None, path)
            self._remember(path, number)
        changed = self._spool.execute(
            "UPDATE inode SET mode = ?, uid = ?, gid = ?, seconds = ?, nanoseconds = ?, xattrs = ?, tail = x'' "
            "WHERE id = ? AND mode IS NULL",
            (*owner, xattrs, number),
        ).rowcount
        if not changed:
            raise SourceError(f"{printable(path)}: given twice")

    def _complete_directories(self) -> None:
        if self._synthesise:
            self._spool.execute(
                "UPDATE inode SET mode = ?, uid = 0, gid = 0, tail = x'' WHERE mode IS NULL", (_SYNTHETIC_MODE,)
            )
        missing = self._spool.execute("SELECT tail FROM inode WHERE mode IS NULL ORDER BY id LIMIT 1").fetchone()
        if missing:
            raise SourceError(f"{printable(missing[0])}: directory was never added, but entries below it were")

    # Contents

    def _store_target(self, path: bytes, target: bytes, xattrs_size: int) -> tuple[int, int, int, bytes]:
        if not 0 < len(target) <= MAX_TARGET or b"\0" in target:
            raise SourceError(f"{printable(path)}: symbolic link target of {len(target)} bytes cannot be kept")
        if EXTENDED_INODE.size + xattrs_size + len(target) <= BLOCK_SIZE:
            return LAYOUT_INLINE, 0, len(target), target
        start = self._reserve(path, len(target))
        self._sink.write(target)
        self._write_zeros(-len(target) % BLOCK_SIZE)
        return LAYOUT_PLAIN, start, 0, b""

    def _store_file(
        self, path: bytes, size: int, data: DataSource | None, extents: Sequence[tuple[int, int]] | None
    ) -> tuple[int, int, int, bytes]:
        """Stream a file's contents; returns layout, field `u`, size of the block map, and runs of a sparse file."""
        if extents is None:
            extents = ((0, size),)
        _check_extents(path, size, extents)
        if data is None and extents:
            raise SourceError(f"{printable(path)}: {size} bytes, but no contents given")
        plan = plan_chunks(size, extents)
        runs = bytearray()
        remaining = iter(extents)
        extent = next(remaining, None)
        step = 1 << (plan.chunk_bits - BLOCK_BITS)
        covered = first = 0
        for start, end in plan.ranges:
            first = self._reserve(path, end - start)
            chunk, stop = start >> plan.chunk_bits, -(-end >> plan.chunk_bits)
            if chunk > covered:
                runs += CHUNK_RUN.pack(chunk - covered, NULL_BLOCK, 0)
            runs += CHUNK_RUN.pack(stop - chunk, first, step)
            covered = stop
            position = start
            while extent is not None and extent[0] < end and data is not None:
                self._write_zeros(extent[0] - position)
                self._copy(path, data, extent[1])
                position = extent[0] + extent[1]
                extent = next(remaining, None)
            self._write_zeros(end - position)
        if not plan.index_size:
            return LAYOUT_PLAIN, first, 0, b""
        chunks = -(-size >> plan.chunk_bits)
        if chunks > covered:
            runs += CHUNK_RUN.pack(chunks - covered, NULL_BLOCK, 0)
        self._sparse = True
        return LAYOUT_CHUNKED, plan.chunk_bits - BLOCK_BITS, plan.index_size, bytes(runs)

    def _reserve(self, path: bytes, size: int) -> int:
        """The block at which the next `size` bytes go."""
        block = self._sink.position // BLOCK_SIZE
        if block + size // BLOCK_SIZE + 1 > MAX_BLOCKS:
            raise SourceError(f"{printable(path)}: the image would exceed 16 TiB, the most that EROFS addresses")
        return block

    def _copy(self, path: bytes, data: DataSource, size: int) -> None:
        self._data_size += size
        remaining = size
        while remaining:
            count = data.readinto(self._sink.buffer()[:remaining])
            if not count:
                raise SourceError(
                    f"{printable(path)}: ends {remaining} bytes early", hint="it changed while it was read"
                )
            self._sink.advance(count)
            remaining -= count

    def _write_zeros(self, size: int) -> None:
        while size:
            room = self._sink.buffer()
            count = min(size, len(room), len(_ZEROS))
            room[:count] = _ZEROS[:count]
            self._sink.advance(count)
            size -= count


def _check_extents(path: bytes, size: int, extents: Sequence[tuple[int, int]]) -> None:
    end = 0
    for offset, length in extents:
        if offset < end or length <= 0 or offset + length > size:
            raise SourceError(f"{printable(path)}: its extents overlap, are out of order or exceed its size")
        end = offset + length
