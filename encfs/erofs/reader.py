"""Read an uncompressed EROFS image through `read(offset, size)`: nothing is loaded when it is opened.

Names are looked up by binary search in the image. Metadata is read in aligned windows, of which a few are kept: the
inodes of a directory's entries lie side by side, so that one window serves many of them.

An image may come from someone hostile (a hash tree says that its bytes are the author's, not that the author meant
well). Whatever does not fit is a FormatError; work and memory are bounded by the request or by the size of the image.
Not here: loops of directories, which only a walk can meet (`walk`), and the checking of bytes, which `read` has done.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from functools import lru_cache

from encfs.erofs.structures import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CHUNK_BITS_MASK,
    CHUNK_BLOCK,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    CHUNK_KNOWN,
    COMPACT_INODE,
    DIRENT,
    DIRENT_NAME_OFFSET,
    EXTENDED_INODE,
    FILE_TYPES,
    FORMAT_EXTENDED,
    FORMAT_KNOWN,
    FORMAT_LAYOUT_MASK,
    FORMAT_LAYOUT_SHIFT,
    LAYOUT_CHUNKED,
    LAYOUT_INLINE,
    LAYOUTS,
    MAX_NAME,
    MAX_TARGET,
    NAME_OFFSET,
    NANOSECONDS,
    NID_BITS,
    NULL_BLOCK,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    XATTR_ALIGNMENT,
    XATTR_HEADER,
    align,
    decode_device,
    parse_superblock,
)
from encfs.erofs.tree import DirectoryEntry, Inode, Read, resolve
from encfs.erofs.xattrs import decode_xattrs
from encfs.errors import FormatError, UnsupportedError

_WINDOW_BITS = 16
_WINDOW_SIZE = 1 << _WINDOW_BITS
_WINDOW_MASK = _WINDOW_SIZE - 1
#: Windows kept: 4 MiB at most.
_WINDOWS = 64
#: Entries of a block map that are read at a time.
_MAP_STEP = 1024
_MAX_SECONDS = (1 << 63) - 1
_FORMAT = struct.Struct("<H")
#: Files whose `u` is a place of data. All others have none.
_WITH_DATA = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK})
_DEVICES = frozenset({stat.S_IFCHR, stat.S_IFBLK})


class ErofsReader:
    """An image behind `read(offset, size)`, which returns verified bytes, or raises. Thread-safe if `read` is.

    Every method raises FormatError where the image is malformed, and what `read` raises.
    """

    def __init__(self, read: Read, size: int) -> None:
        """`size` of the image in bytes. Raises FormatError, and UnsupportedError for features that cannot be read."""
        self._read = read
        self._size = size
        self._window = lru_cache(maxsize=_WINDOWS)(self._load_window)
        superblock = parse_superblock(self._bytes(SUPERBLOCK_OFFSET, SUPERBLOCK.size))
        if superblock.blocks * BLOCK_SIZE > size:
            raise FormatError(f"EROFS image of {size} bytes is shorter than the {superblock.blocks} blocks it states")
        if superblock.inodes > size >> NID_BITS:
            raise FormatError(f"EROFS image of {size} bytes cannot hold the {superblock.inodes} inodes it states")
        self._metadata = superblock.metadata_block * BLOCK_SIZE
        self._shared_xattrs = superblock.xattr_block * BLOCK_SIZE
        self._epoch = superblock.epoch
        self._epoch_nsec = superblock.epoch_nsec
        self.root = superblock.root_nid
        self.inode_count = superblock.inodes
        self.block_count = superblock.blocks
        if not stat.S_ISDIR(self.inode(self.root).mode):
            raise FormatError("the root of the EROFS image is no directory")

    # Bytes

    def _load_window(self, index: int) -> bytes:
        offset = index << _WINDOW_BITS
        wanted = min(_WINDOW_SIZE, self._size - offset)
        window = bytes(self._read(offset, wanted))
        if len(window) != wanted:
            raise FormatError("EROFS image ends before its stated size")
        return window

    def _bytes(self, offset: int, size: int) -> bytes:
        """A small piece of metadata, through the windows."""
        if offset < 0 or offset + size > self._size:
            raise FormatError("EROFS metadata lies beyond the end of the image")
        start = offset & _WINDOW_MASK
        piece = self._window(offset >> _WINDOW_BITS)[start : start + size]
        if len(piece) == size:
            return piece
        pieces = [piece]
        offset += len(piece)
        size -= len(piece)
        while size:
            piece = self._window(offset >> _WINDOW_BITS)[:size]
            pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
        return b"".join(pieces)

    # Inodes

    def inode(self, nid: int) -> Inode:
        """The inode with this number. Numbers come from `root`, `lookup` and `entries`."""
        offset = self._metadata + (nid << NID_BITS)
        if nid < 0 or offset + COMPACT_INODE.size > self._size:
            raise FormatError(f"EROFS inode {nid} lies beyond the end of the image")
        # Units of 32 bytes never cross a window.
        data = self._window(offset >> _WINDOW_BITS)
        position = offset & _WINDOW_MASK
        (form,) = _FORMAT.unpack_from(data, position)
        if form & FORMAT_EXTENDED:
            if position + EXTENDED_INODE.size > len(data):
                data, position = self._bytes(offset, EXTENDED_INODE.size), 0
            _, units, mode, _, size, start, _, uid, gid, seconds, nanoseconds, nlink = EXTENDED_INODE.unpack_from(
                data, position
            )
            if nanoseconds >= NANOSECONDS:
                raise FormatError(f"EROFS inode {nid} has an impossible time")
            xattr_offset = offset + EXTENDED_INODE.size
        else:
            _, units, mode, nlink, size, seconds, start, _, uid, gid, _ = COMPACT_INODE.unpack_from(data, position)
            seconds += self._epoch
            nanoseconds = self._epoch_nsec
            xattr_offset = offset + COMPACT_INODE.size
        layout = (form >> FORMAT_LAYOUT_SHIFT) & FORMAT_LAYOUT_MASK
        if form & ~FORMAT_KNOWN or layout not in LAYOUTS:
            raise UnsupportedError(f"EROFS inode {nid} has format {form:#x}, which is not supported")
        kind = mode & 0o170000
        rdev = 0
        if kind not in _WITH_DATA:
            if kind not in FILE_TYPES:
                raise FormatError(f"EROFS inode {nid} is of no known kind, mode {mode:#o}")
            size = 0
            if kind in _DEVICES:
                rdev = decode_device(start)
        elif size >> 63:
            raise FormatError(f"EROFS inode {nid} has an impossible size")
        xattr_size = XATTR_HEADER.size + XATTR_ALIGNMENT * (units - 1) if units else 0
        if not -_MAX_SECONDS <= seconds <= _MAX_SECONDS:
            raise FormatError(f"EROFS inode {nid} has an impossible time")
        mtime_ns = seconds * NANOSECONDS + nanoseconds
        return Inode(nid, mode, uid, gid, nlink, size, rdev, mtime_ns, layout, start, xattr_offset, xattr_size)

    def xattrs(self, inode: Inode) -> dict[bytes, bytes]:
        """Extended attributes by their full names. The kernel shows POSIX ACLs under these names too."""
        if not inode.xattr_size:
            return {}
        area = self._bytes(inode.xattr_offset, inode.xattr_size)
        return dict(decode_xattrs(area, lambda offset, size: self._bytes(self._shared_xattrs + offset, size)))

    def readlink(self, inode: Inode) -> bytes:
        """The target of a symbolic link."""
        if not stat.S_ISLNK(inode.mode) or not 0 < inode.size <= MAX_TARGET:
            raise FormatError(f"EROFS inode {inode.nid} is no symbolic link, or has an impossible target")
        target = self.read(inode, 0, inode.size)
        if b"\0" in target:
            raise FormatError(f"EROFS inode {inode.nid} has an impossible target")
        return target

    # Contents

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """At most `size` bytes of contents from `offset`; fewer only at the end of the file."""
        pieces = []
        for place, length in self.extents(inode, offset, size):
            piece = bytes(length) if place is None else bytes(self._read(place, length))
            if len(piece) != length:
                raise FormatError("EROFS image ends before its stated size")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def extents(self, inode: Inode, offset: int, size: int) -> Iterator[tuple[int | None, int]]:
        """Where contents lie: (offset in the image, or None for a hole, length), tiling what of the range is in the
        file.

        Neighbours are joined. Only the piece of a block map that the range needs is read.
        """
        end = min(offset + size, inode.size)
        if offset < 0 or offset >= end:
            return
        if inode.layout == LAYOUT_CHUNKED:
            yield from self._joined_chunks(inode, offset, end)
            return
        while offset < end:
            place, run = self._flat_run(inode, offset)
            length = min(run, end - offset)
            yield place, length
            offset += length

    def _flat_run(self, inode: Inode, offset: int) -> tuple[int, int]:
        """Where the byte at `offset` of a flat file lies in the image, and how many lie there side by side."""
        whole = inode.size & -BLOCK_SIZE if inode.layout == LAYOUT_INLINE else inode.size
        if offset < whole:
            place, run = inode.start * BLOCK_SIZE + offset, whole - offset
        else:
            tail = inode.xattr_offset + inode.xattr_size
            if tail % BLOCK_SIZE + inode.size - whole > BLOCK_SIZE:
                raise FormatError(f"EROFS inode {inode.nid} has an inline tail that crosses a block")
            place, run = tail + offset - whole, inode.size - offset
        if place + run > self._size:
            raise FormatError(f"EROFS inode {inode.nid} has contents beyond the end of the image")
        return place, run

    def _joined_chunks(self, inode: Inode, offset: int, end: int) -> Iterator[tuple[int | None, int]]:
        place: int | None = None
        length = 0
        for chunk_place, chunk_length in self._chunks(inode, offset, end):
            if length and (chunk_place == (None if place is None else place + length)):
                length += chunk_length
                continue
            if length:
                yield place, length
            place, length = chunk_place, chunk_length
        yield place, length

    def _chunks(self, inode: Inode, offset: int, end: int) -> Iterator[tuple[int | None, int]]:
        if inode.start & ~CHUNK_KNOWN:
            raise UnsupportedError(f"EROFS inode {inode.nid} has chunk format {inode.start:#x}, which is not supported")
        bits = BLOCK_BITS + (inode.start & CHUNK_BITS_MASK)
        record = CHUNK_INDEX if inode.start & CHUNK_INDEXES else CHUNK_BLOCK
        table = align(inode.xattr_offset + inode.xattr_size, record.size)
        chunk, last = offset >> bits, (end - 1) >> bits
        while chunk <= last:
            count = min(_MAP_STEP, last + 1 - chunk)
            for fields in record.iter_unpack(self._bytes(table + chunk * record.size, count * record.size)):
                start = chunk << bits
                stop = min(start + (1 << bits), end)
                inside = max(offset - start, 0)
                length = stop - start - inside
                block = fields[-1]
                if block == NULL_BLOCK:
                    yield None, length
                else:
                    if record is CHUNK_INDEX and fields[1]:
                        raise UnsupportedError(f"EROFS inode {inode.nid} has contents on another device")
                    place = block * BLOCK_SIZE + inside
                    if place + length > self._size:
                        raise FormatError(f"EROFS inode {inode.nid} has contents beyond the end of the image")
                    yield place, length
                chunk += 1

    # Directories

    def entries(self, directory: Inode, start: int = 0) -> Iterator[DirectoryEntry]:
        """The entries of a directory, `.` and `..` among them, sorted by name, from 0 or from the `next` of an entry.

        Raises: FormatError also where names are out of order or cannot be names.
        """
        index, resumed = divmod(start, BLOCK_SIZE)
        previous = b""
        if index and not resumed:
            # The names of the block before must be smaller too.
            index, resumed = index - 1, BLOCK_SIZE
        for number in range(index, self._block_count(directory)):
            block = self._directory_block(directory, number)
            names = self._names_offset(directory, block)
            if resumed:
                resumed = min(resumed // DIRENT.size * DIRENT.size, names)
                if resumed:
                    previous = self._name_at(directory, block, names, resumed // DIRENT.size - 1)
            position = number * BLOCK_SIZE + resumed
            records = DIRENT.iter_unpack(block[resumed:names])
            resumed = 0
            record = next(records, None)
            while record is not None:
                nid, start, kind = record
                record = next(records, None)
                position += DIRENT.size
                if record is None:
                    name = block[start:].partition(b"\0")[0]
                    position = (number + 1) * BLOCK_SIZE
                else:
                    name = block[start : record[1]]
                if not previous < name or start < names or len(name) > MAX_NAME or b"/" in name or b"\0" in name:
                    raise FormatError(f"EROFS directory {directory.nid} has an impossible name, or names out of order")
                previous = name
                yield DirectoryEntry(name, nid, kind, position)

    def lookup(self, directory: Inode, name: bytes) -> int | None:
        """The inode number behind a name, None where there is no such name. Binary search over blocks, then within
        one."""
        if not name or b"\0" in name:
            return None
        low, high = 0, self._block_count(directory)
        block = b""
        names = 0
        # The last block whose first name is not behind `name`.
        while low < high:
            middle = (low + high) // 2
            candidate = self._directory_block(directory, middle)
            candidate_names = self._names_offset(directory, candidate)
            first = self._name_at(directory, candidate, candidate_names, 0)
            if first <= name:
                block, names, low = candidate, candidate_names, middle + 1
            else:
                high = middle
        low, high = 0, names // DIRENT.size
        while low < high:
            middle = (low + high) // 2
            found = self._name_at(directory, block, names, middle)
            if found == name:
                nid: int = DIRENT.unpack_from(block, middle * DIRENT.size)[0]
                return nid
            if found < name:
                low = middle + 1
            else:
                high = middle
        return None

    def _block_count(self, directory: Inode) -> int:
        if not stat.S_ISDIR(directory.mode):
            raise FormatError(f"EROFS inode {directory.nid} is no directory")
        if directory.size > self._size:
            raise FormatError(f"EROFS directory {directory.nid} is larger than the image")
        return -(-directory.size // BLOCK_SIZE)

    def _directory_block(self, directory: Inode, number: int) -> bytes:
        offset = number * BLOCK_SIZE
        size = min(BLOCK_SIZE, directory.size - offset)
        place: int | None
        if directory.layout == LAYOUT_CHUNKED:
            place, run = next(self.extents(directory, offset, size))
        else:
            place, run = self._flat_run(directory, offset)
        if place is None or run < size or size < DIRENT.size:
            raise FormatError(f"EROFS directory {directory.nid} has a hole or a fragment")
        return self._bytes(place, size)

    @staticmethod
    def _names_offset(directory: Inode, block: bytes) -> int:
        """Where names begin in a block, which tells how many records come before them."""
        (names,) = NAME_OFFSET.unpack_from(block, DIRENT_NAME_OFFSET)
        if not names or names % DIRENT.size or names >= len(block):
            raise FormatError(f"EROFS directory {directory.nid} has a malformed block")
        return int(names)

    @staticmethod
    def _name_at(directory: Inode, block: bytes, names: int, index: int) -> bytes:
        position = index * DIRENT.size + DIRENT_NAME_OFFSET
        (start,) = NAME_OFFSET.unpack_from(block, position)
        if position + DIRENT.size < names:
            (end,) = NAME_OFFSET.unpack_from(block, position + DIRENT.size)
            name = block[start:end]
        else:
            name = block[start:].partition(b"\0")[0]
        if start < names or not name:
            raise FormatError(f"EROFS directory {directory.nid} has a malformed block")
        return name

    # Paths

    def resolve(self, path: bytes, follow: bool = True) -> Inode:
        """As `encfs.erofs.tree.resolve`."""
        return resolve(self, path, follow)
