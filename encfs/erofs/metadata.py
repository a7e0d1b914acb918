"""Lay out and write the metadata region: all inodes and directories of an image, in the order of a tree walk.

Directories are visited in preorder, siblings sorted by name. A visit emits the directory's own blocks, if its entries
did not fit behind its inode, and then the inodes of all its children, sorted: so listing a directory with the
attributes of its entries touches one run of bytes, and a walk of the tree reads the region once from front to back. No
inode crosses a block boundary, and what is inline lies in the same block as its inode.

Two passes over the spool: the first assigns every inode its place, the second writes. Neither recurses, and neither
holds more than one directory's block or a batch of rows.
"""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterable, Iterator
from struct import Struct
from typing import Protocol

from encfs.erofs.spool import ROOT_ID, fill_directories
from encfs.erofs.structures import (
    BLOCK_SIZE,
    CHUNK_BLOCK,
    COMPACT_INODE,
    DIRENT,
    EXTENDED_INODE,
    FORMAT_EXTENDED,
    FORMAT_LAYOUT_SHIFT,
    LAYOUT_CHUNKED,
    LAYOUT_INLINE,
    LAYOUT_PLAIN,
    MAX_BLOCKS,
    NID_BITS,
    NID_UNIT,
    NULL_BLOCK,
    TYPE_DIRECTORY,
    XATTR_ALIGNMENT,
    XATTR_HEADER,
    align,
)
from encfs.errors import SourceError

ROOT_NID = 1

#: Runs of a sparse file as the spool keeps them: number of chunks, first block (`NULL_BLOCK`: a hole), blocks to a
#: chunk.
CHUNK_RUN = Struct("<QIQ")

_FLUSH_SIZE = 1 << 18
_BATCH = 1024
_BLOCKS_PER_MAP = 1 << 14

#: "." and ".." alone; every further entry adds a record and its name.
_EMPTY_DIRECTORY_SIZE = 2 * DIRENT.size + len(b"." + b"..")

_SELECT_CHILDREN = """
SELECT inode.id, uid, gid, seconds, nanoseconds, size, nlink, layout, extra, length(xattrs)
FROM name JOIN inode ON inode.id = name.inode WHERE parent = ? AND owner = 1 ORDER BY name
"""
_SELECT_ROOT = """
SELECT id, uid, gid, seconds, nanoseconds, size, nlink, layout, extra, length(xattrs)
FROM inode WHERE id = ?
"""
_SELECT_RECORDS = """
SELECT inode.id, mode, uid, gid, seconds, nanoseconds, size, nlink, layout, start, extra, xattrs, tail, nid
FROM name JOIN inode ON inode.id = name.inode WHERE parent = ? AND owner = 1 ORDER BY name
"""
_SELECT_ROOT_RECORD = """
SELECT id, mode, uid, gid, seconds, nanoseconds, size, nlink, layout, start, extra, xattrs, tail, nid
FROM inode WHERE id = ?
"""
_SELECT_ENTRIES = """
SELECT name, nid, type FROM name JOIN inode ON inode.id = name.inode WHERE parent = ? ORDER BY name
"""


class _Sink(Protocol):
    def write(self, data: bytes | bytearray | memoryview) -> None: ...


def write_metadata(spool: sqlite3.Connection, sink: _Sink, first_block: int, epoch: int) -> int:
    """Write the metadata of everything in `spool` at block `first_block`; returns the number of blocks written.

    Raises: SourceError where the image grows beyond what 32-bit block addresses reach.
    """
    fill_directories(spool)
    _measure_directories(spool)
    size = _assign_places(spool, first_block, epoch)
    blocks = align(size, BLOCK_SIZE) // BLOCK_SIZE
    if first_block + blocks > MAX_BLOCKS:
        raise SourceError("the image would exceed 16 TiB, the most that EROFS addresses")
    _emit(spool, _Region(sink), epoch)
    return blocks


def _measure_directories(spool: sqlite3.Connection) -> None:
    """Set size, link count and layout of every directory."""
    spool.execute(
        """
        UPDATE inode SET
            size = ? + (SELECT coalesce(sum(? + length(name)), 0) FROM name WHERE parent = inode.id),
            nlink = 2 + (SELECT count(*) FROM name WHERE parent = inode.id AND type = ?)
        WHERE id IN (SELECT id FROM directory)
        """,
        (_EMPTY_DIRECTORY_SIZE, DIRENT.size, TYPE_DIRECTORY),
    )
    # Entries do not cross blocks: where there are several blocks, the gaps at their ends count.
    large = [
        (_packed_size(_with_dots(spool.execute(_SELECT_ENTRIES, (number,)), 0, 0)), number)
        for (number,) in spool.execute(
            "SELECT id FROM inode WHERE size > ? AND id IN (SELECT id FROM directory)", (BLOCK_SIZE,)
        )
    ]
    spool.executemany("UPDATE inode SET size = ? WHERE id = ?", large)
    spool.execute(
        "UPDATE inode SET layout = ?, extra = size "
        "WHERE id IN (SELECT id FROM directory) AND ? + length(xattrs) + size <= ?",
        (LAYOUT_INLINE, EXTENDED_INODE.size, BLOCK_SIZE),
    )
    # The root inode starts behind the unused nid 0 and cannot move to the next block.
    spool.execute(
        "UPDATE inode SET layout = ?, extra = 0 WHERE id = ? AND ? + length(xattrs) + size > ?",
        (LAYOUT_PLAIN, ROOT_ID, ROOT_NID * NID_UNIT + EXTENDED_INODE.size, BLOCK_SIZE),
    )


def _visits(spool: sqlite3.Connection) -> Iterator[tuple[int, int, int, int, int, int]]:
    """Directories in visiting order: id, nid, parent's nid, layout, start, size, as they are by then."""
    visit = 0
    while True:
        batch = spool.execute(
            "SELECT visit, id, parent FROM directory WHERE visit > ? LIMIT ?", (visit, _BATCH)
        ).fetchall()
        if not batch:
            return
        for visit, number, parent in batch:  # noqa: B007 (the last one is where the next batch begins)
            yield spool.execute(
                """
                SELECT inode.id, inode.nid, parent.nid, inode.layout, inode.start, inode.size
                FROM inode JOIN inode AS parent ON parent.id = ? WHERE inode.id = ?
                """,
                (parent, number),
            ).fetchone()


def _assign_places(spool: sqlite3.Connection, first_block: int, epoch: int) -> int:
    """Give inodes their nids, and directories with blocks of their own the first; returns the region's size (bytes)."""
    offset = _place_all(spool, spool.execute(_SELECT_ROOT, (ROOT_ID,)), ROOT_NID * NID_UNIT, epoch)
    for number, _nid, _parent, layout, _start, size in _visits(spool):
        if layout == LAYOUT_PLAIN:
            offset = align(offset, BLOCK_SIZE)
            start = first_block + offset // BLOCK_SIZE
            spool.execute("UPDATE inode SET start = ? WHERE id = ?", (start, number))
            offset += align(size, BLOCK_SIZE)
        offset = _place_all(spool, spool.execute(_SELECT_CHILDREN, (number,)), offset, epoch)
    return offset


def _place_all(spool: sqlite3.Connection, rows: sqlite3.Cursor, offset: int, epoch: int) -> int:
    while batch := rows.fetchmany(_BATCH):
        places = []
        for number, uid, gid, seconds, nanoseconds, size, nlink, layout, extra, xattrs in batch:
            core = (
                COMPACT_INODE.size
                if _is_compact(uid, gid, seconds, nanoseconds, size, nlink, epoch)
                else EXTENDED_INODE.size
            )
            unbroken = core + xattrs + extra if layout == LAYOUT_INLINE else core
            if offset % BLOCK_SIZE + unbroken > BLOCK_SIZE:
                offset = align(offset, BLOCK_SIZE)
            places.append((offset >> NID_BITS, number))
            offset = align(offset + core + xattrs + extra, NID_UNIT)
        spool.executemany("UPDATE inode SET nid = ? WHERE id = ?", places)
    return offset


def _is_compact(uid: int, gid: int, seconds: int, nanoseconds: int, size: int, nlink: int, epoch: int) -> bool:
    """Whether the compact form loses nothing: 16 bits for owners and links, 32 for the size, and the epoch as time."""
    return (
        uid <= 0xFFFF
        and gid <= 0xFFFF
        and nlink <= 0xFFFF
        and size <= 0xFFFFFFFF
        and seconds == epoch
        and not nanoseconds
    )


class _Region:
    """Buffers what is written, and knows how far into the region it is (bytes)."""

    def __init__(self, sink: _Sink) -> None:
        self._sink = sink
        self._pending = bytearray()
        self._flushed = 0

    def pad(self, offset: int) -> None:
        """Fill up with zeros to `offset`."""
        missing = offset - self._flushed - len(self._pending)
        if missing < 0:
            raise AssertionError("metadata written behind its place")
        self.write(bytes(missing))

    def align(self) -> None:
        self.write(bytes(-(self._flushed + len(self._pending)) % BLOCK_SIZE))

    def write(self, data: bytes) -> None:
        self._pending += data
        if len(self._pending) >= _FLUSH_SIZE:
            self.flush()

    def flush(self) -> None:
        self._sink.write(self._pending)
        self._flushed += len(self._pending)
        self._pending = bytearray()


def _emit(spool: sqlite3.Connection, region: _Region, epoch: int) -> None:
    _emit_inodes(spool, region, spool.execute(_SELECT_ROOT_RECORD, (ROOT_ID,)), ROOT_NID, epoch)
    for number, nid, parent_nid, layout, _start, _size in _visits(spool):
        if layout == LAYOUT_PLAIN:
            for block in _directory_blocks(_entries(spool, number, nid, parent_nid)):
                region.align()
                region.write(block)
            region.align()
        _emit_inodes(spool, region, spool.execute(_SELECT_RECORDS, (number,)), nid, epoch)
    region.align()
    region.flush()


def _emit_inodes(spool: sqlite3.Connection, region: _Region, rows: sqlite3.Cursor, parent_nid: int, epoch: int) -> None:
    for number, mode, uid, gid, seconds, nanoseconds, size, nlink, layout, start, extra, xattrs, tail, nid in rows:
        region.pad(nid << NID_BITS)
        form = layout << FORMAT_LAYOUT_SHIFT
        units = 1 + (len(xattrs) - XATTR_HEADER.size) // XATTR_ALIGNMENT if xattrs else 0
        ino = nid & 0xFFFFFFFF
        if _is_compact(uid, gid, seconds, nanoseconds, size, nlink, epoch):
            core = COMPACT_INODE.pack(form, units, mode, nlink, size, 0, start, ino, uid, gid, 0)
        else:
            core = EXTENDED_INODE.pack(
                form | FORMAT_EXTENDED, units, mode, 0, size, start, ino, uid, gid, seconds, nanoseconds, nlink
            )
        region.write(core + xattrs)
        if not extra:
            continue
        if layout == LAYOUT_CHUNKED:
            _emit_block_map(region, tail)
        elif stat.S_ISDIR(mode):
            for block in _directory_blocks(_entries(spool, number, nid, parent_nid)):
                region.write(block)
        else:
            region.write(tail)


def _emit_block_map(region: _Region, runs: bytes) -> None:
    for count, block, step in CHUNK_RUN.iter_unpack(runs):
        for first in range(0, count, _BLOCKS_PER_MAP):
            part = range(first, min(first + _BLOCKS_PER_MAP, count))
            if block == NULL_BLOCK:
                region.write(CHUNK_BLOCK.pack(NULL_BLOCK) * len(part))
            else:
                region.write(b"".join([CHUNK_BLOCK.pack(block + index * step) for index in part]))


Dirent = tuple[bytes, int, int]


def _entries(spool: sqlite3.Connection, number: int, nid: int, parent_nid: int) -> Iterator[Dirent]:
    return _with_dots(spool.execute(_SELECT_ENTRIES, (number,)), nid, parent_nid)


def _with_dots(entries: Iterable[Dirent], nid: int, parent_nid: int) -> Iterator[Dirent]:
    """The entries of a directory with `.` and `..` where they sort: behind names such as `!` or `-`."""
    waiting = [(b"..", parent_nid, TYPE_DIRECTORY), (b".", nid, TYPE_DIRECTORY)]
    for entry in entries:
        while waiting and waiting[-1][0] < entry[0]:
            yield waiting.pop()
        yield entry
    yield from reversed(waiting)


def _blocks_of_entries(entries: Iterable[Dirent]) -> Iterator[tuple[list[Dirent], int]]:
    """Entries cut into the blocks that hold them, with the size of each in bytes."""
    block: list[Dirent] = []
    used = 0
    for entry in entries:
        needed = DIRENT.size + len(entry[0])
        if used + needed > BLOCK_SIZE:
            yield block, used
            block, used = [], 0
        block.append(entry)
        used += needed
    yield block, used


def _packed_size(entries: Iterable[Dirent]) -> int:
    size = 0
    for _block, used in _blocks_of_entries(entries):
        size = align(size, BLOCK_SIZE) + used
    return size


def _directory_blocks(entries: Iterable[Dirent]) -> Iterator[bytes]:
    for block, _used in _blocks_of_entries(entries):
        offset = len(block) * DIRENT.size
        records = []
        for name, nid, kind in block:
            records.append(DIRENT.pack(nid, offset, kind))
            offset += len(name)
        yield b"".join(records) + b"".join([name for name, _nid, _kind in block])
