"""Write an uncompressed EROFS image in one pass over its input.

File contents go straight to the sink in the order of `add`; metadata follows as one region when `finish` knows all of
it; the superblock is written into the reserved first block last of all. Memory does not grow with the number of files.

The image is a function of the entries, their order, and the options: no clock, no random number, nothing of the
machine. Not here: where entries come from, and whether a file changed while it was read (beyond its becoming shorter).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from encfs.erofs.metadata import CHUNK_RUN, ROOT_NID, write_metadata
from encfs.erofs.names import Names
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
    MAX_TARGET,
    NANOSECONDS,
    NULL_BLOCK,
    TYPE_DIRECTORY,
    Superblock,
    encode_device,
    pack_superblock,
    printable,
)
from encfs.erofs.xattrs import decode_inline_xattrs, encode_xattrs
from encfs.errors import SourceError

_ZEROS = bytes(1 << 16)
#: A file that takes this many times the alignment begins at a multiple of it: at most one part in 32 is padding.
_ALIGNED_SIZE = 32
_MAX_SIZE = (1 << 63) - 1
_MAX_ID = (1 << 32) - 1
_SYNTHETIC_MODE = stat.S_IFDIR | 0o755
_MODES = {kind: mode for mode, kind in FILE_TYPES.items()}


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
    without it they are a SourceError. With `replace`, a path that is there already is no error, but what is added takes
    its place: a directory takes over what is in a directory, anything else is removed first with all that lies below.
    The contents of removed files stay in the image as blocks that nothing names. With `alignment`, a multiple of
    BLOCK_SIZE in bytes, large files begin at multiples of it.
    """

    def __init__(
        self,
        sink: ImageSink,
        *,
        uuid: bytes,
        epoch: int = 0,
        synthesise_parents: bool = False,
        replace: bool = False,
        alignment: int = BLOCK_SIZE,
    ) -> None:
        if len(uuid) != 16:
            raise ValueError("a UUID has 16 bytes")
        if alignment <= 0 or alignment % BLOCK_SIZE:
            raise ValueError("files begin at blocks")
        if not 0 <= epoch <= _MAX_SIZE:
            raise ValueError("the epoch is a number of seconds from 1970 onwards")
        if sink.position:
            raise ValueError("an image begins at the start of its sink")
        self._sink = sink
        self._uuid = uuid
        self._epoch = epoch
        self._synthesise = synthesise_parents
        self._replace = replace
        self._alignment = alignment
        self._data_size = 0
        self._sparse = False
        self._spool = open_spool()
        self._names = Names(self._spool, epoch)
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
                    self._names.link(entry.path, entry.link_to, replace=self._replace)
                else:
                    self._add_inode(entry, data, extents)
        except BaseException:
            # Half an entry may be noted: nothing can be finished any more.
            self.close()
            raise

    def kind(self, path: bytes) -> int | None:
        """`S_IFMT` of what has been added, or is implied, at a path; None where there is nothing."""
        with storage_errors():
            found = self._names.find(path)
        return None if found is None else _MODES[found[1]]

    def remove(self, path: bytes, *, contents_only: bool = False) -> None:
        """Remove what is at a path with everything below it, or only what is in it; harmless where nothing is."""
        with storage_errors():
            self._names.remove(path, contents_only=contents_only)

    def imply_directory(self, path: bytes) -> None:
        """Note a directory as one that something below it implies. Raises: SourceError."""
        with storage_errors():
            self._names.imply_directory(path)

    def implied_directories(self) -> Iterator[bytes]:
        """Directories that were not added so far, but entries below them; upper ones first, the root as b"".

        They may be added while this goes on.
        """
        with storage_errors():
            yield from self._names.implied()

    def set_directory_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        """Give a directory that has been added one attribute more. Raises: SourceError."""
        with storage_errors():
            found = self._names.find(path)
            if found is None or found[1] != TYPE_DIRECTORY:
                raise SourceError(f"{printable(path)}: not a directory of the image")
            (area,) = self._spool.execute("SELECT xattrs FROM inode WHERE id = ?", (found[0],)).fetchone()
            kept = [item for item in decode_inline_xattrs(area) if item[0] != name]
            encoded = encode_xattrs(path, [*kept, (name, value)])
            self._spool.execute("UPDATE inode SET xattrs = ? WHERE id = ?", (encoded, found[0]))

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
                    inodes=self._names.inodes,
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
        return ImageSummary(
            blocks * BLOCK_SIZE, self._names.inodes, self._names.count, self._data_size, metadata_offset
        )

    # Inodes

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
        parent, name = self._names.split(path)
        if self._replace:
            self._names.remove_in(parent, name)
        number = self._names.new_inode()
        self._names.insert(path, parent, name, number, kind, owner=True)
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
        self._names.insert_inode(values)

    def _add_directory(self, path: bytes, owner: tuple[int, int, int, int, int], xattrs: bytes) -> None:
        number = ROOT_ID
        if path:
            parent, name = self._names.split(path)
            found = self._names.find_in(parent, name)
            if found and found[1] != TYPE_DIRECTORY and self._replace:
                self._names.remove_in(parent, name)
                found = None
            number = found[0] if found and found[1] == TYPE_DIRECTORY else self._names.imply(path, parent, name)
            self._names.remember(path, number)
        changed = self._spool.execute(
            "UPDATE inode SET mode = ?, uid = ?, gid = ?, seconds = ?, nanoseconds = ?, xattrs = ? "
            "WHERE id = ? AND (mode IS NULL OR ?)",
            (*owner, xattrs, number, self._replace),
        ).rowcount
        if not changed:
            raise SourceError(f"{printable(path)}: given twice")

    def _complete_directories(self) -> None:
        if self._synthesise:
            self._spool.execute("UPDATE inode SET mode = ?, uid = 0, gid = 0 WHERE mode IS NULL", (_SYNTHETIC_MODE,))
        missing = next(self._names.implied(), None)
        if missing is not None:
            raise SourceError(f"{printable(missing)}: directory was never added, but entries below it were")

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
        if plan.cost - plan.index_size >= _ALIGNED_SIZE * self._alignment:
            self._write_zeros(-self._sink.position % self._alignment)
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
