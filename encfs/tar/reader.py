"""Members of a tar archive, in order, from a stream: ustar, pax, GNU and star headers, old ones too.

Only one header and its extensions are in memory. Whatever is not read as a member's contents is handed to `literal`, so
that a caller can keep it and give the archive back byte for byte. Not here: what names may be.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from encfs.errors import SourceError
from encfs.tar.header import BLOCK, ZERO_BLOCK, Header, gnu_real_size, gnu_sparse_map, parse_header
from encfs.tar.pax import MAX_EXTENDED_SIZE, Extended, check_global, parse_extended
from encfs.tar.sparse import (
    MAX_EXTENTS,
    check_extents,
    map_from_data,
    map_from_records,
    real_size,
    sparse_version,
)

_EXTENDED: Final = b"x"
_GLOBAL: Final = b"g"
_LONG_NAME: Final = b"L"
_LONG_LINK: Final = b"K"
_OLD_REGULAR: Final = b"\0"
_GNU_SPARSE: Final = b"S"
_LINK: Final = b"1"
#: Types that have contents, and those that have none whatever their size says.
_REGULAR: Final = frozenset({b"0", _OLD_REGULAR, b"7", _GNU_SPARSE})
_KINDS: Final = {
    **dict.fromkeys(_REGULAR, stat.S_IFREG),
    _LINK: 0,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
_NANOSECONDS: Final = 1_000_000_000
_MAX_NANOSECONDS: Final = 1 << 93
_SKIP_SIZE: Final = 1 << 16
#: Extended headers and long names before one member.
_MAX_EXTENSIONS: Final = 16


class Input(Protocol):
    """Where an archive comes from."""

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill a part of `buffer` from its start; 0 at the end."""


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. `kind` is its `S_IFMT`, 0 for a hard link; `size` in bytes with holes, `stored` without.

    `extents` are (offset, length) of a sparse file's data, None where there are no holes.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    stored: int
    link_name: bytes
    major: int
    minor: int
    xattrs: tuple[tuple[bytes, bytes], ...] = field(repr=False)
    extents: tuple[tuple[int, int], ...] | None = field(repr=False)


class TarReader:
    """Reads one archive. Iterate over the members, and read a member's contents, or a part, before the next."""

    def __init__(
        self, source: Input, literal: Callable[[bytes], None], skip: Callable[[int], None] | None = None
    ) -> None:
        """`literal` gets all bytes in order that `readinto` does not give out; `skip`, if given, passes over contents
        that nobody reads, and they are not handed to `literal` then."""
        self._source = source
        self._literal = literal
        self._skip = skip
        self._left = 0
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises: SourceError where the archive is malformed or cut short."""
        while (block := self._next_header()) is not None:
            yield self._member(block)
            self._finish_member()
        # What follows the end is part of the stream, but not of the archive.
        while piece := self._take(_SKIP_SIZE):
            self._literal(piece)

    def readinto(self, buffer: memoryview, /) -> int:
        """Contents of the current member, those of a sparse one without its holes; 0 at their end."""
        count = self._source.readinto(buffer[: self._left]) if self._left else 0
        if not count and self._left and buffer:
            raise _cut_short()
        self._left -= count
        return count

    # -- blocks

    def _take(self, size: int) -> bytes:
        """`size` bytes, fewer at the end only."""
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            count = self._source.readinto(view[done:])
            if not count:
                break
            done += count
        return bytes(view[:done])

    def _read(self, size: int) -> bytes:
        """Exactly `size` bytes, also handed to `literal`."""
        data = self._take(size)
        if len(data) != size:
            raise _cut_short()
        self._literal(data)
        return data

    def _read_padded(self, size: int) -> bytes:
        return self._read(size + -size % BLOCK)[:size]

    def _next_header(self) -> bytes | None:
        """The next block that is a header; None at the end: two zero blocks, or no more bytes."""
        block = self._next_block()
        if block != ZERO_BLOCK:
            return block
        if self._next_block() not in (ZERO_BLOCK, None):
            raise SourceError("the tar archive goes on behind a block of zeros", hint="it is damaged")
        return None

    def _next_block(self) -> bytes | None:
        block = self._take(BLOCK)
        self._literal(block)
        if len(block) not in (0, BLOCK):
            raise _cut_short()
        return block or None

    def _finish_member(self) -> None:
        if self._skip is not None:
            self._skip(self._left + self._padding)
        else:
            while self._left:
                size = min(self._left, _SKIP_SIZE)
                self._read(size)
                self._left -= size
            # What umoci writes ends without it.
            self._literal(self._take(self._padding))
        self._left = self._padding = 0

    # -- members

    def _member(self, block: bytes) -> Member:
        extended = Extended()
        long_name = long_link = b""
        for _ in range(_MAX_EXTENSIONS):
            header = parse_header(block)
            if header.kind == _EXTENDED:
                extended = parse_extended(self._extension(header))
            elif header.kind == _GLOBAL:
                check_global(self._extension(header))
            elif header.kind == _LONG_NAME:
                long_name = self._extension(header).partition(b"\0")[0]
            elif header.kind == _LONG_LINK:
                long_link = self._extension(header).partition(b"\0")[0]
            else:
                return self._finish_header(block, header, extended, long_name, long_link)
            following = self._next_header()
            if following is None:
                raise _cut_short()
            block = following
        raise SourceError("an entry of the tar archive has too many extended headers")

    def _extension(self, header: Header) -> bytes:
        if not 0 <= header.size <= MAX_EXTENDED_SIZE:
            raise SourceError(f"an extended header of the tar archive has {header.size} bytes, more than 1 MiB")
        return self._read_padded(header.size)

    def _finish_header(
        self, block: bytes, header: Header, extended: Extended, long_name: bytes, long_link: bytes
    ) -> Member:
        name = long_name or extended.path or header.name
        kind = _KINDS.get(header.kind)
        if kind is None:
            raise SourceError(f"the tar archive has an entry of the unknown type {ascii(header.kind)[1:]}")
        if header.kind == _OLD_REGULAR and name.endswith(b"/"):
            kind = stat.S_IFDIR
        size = header.size if extended.size is None else extended.size
        if kind != stat.S_IFREG:
            size = 0
        if size < 0:
            raise SourceError("an entry of the tar archive has a negative size")
        self._left, self._padding = size, -size % BLOCK
        extents = None
        if header.kind == _GNU_SPARSE:
            size, extents = self._old_sparse(block, header)
        elif sparse_version(extended.sparse):
            if kind != stat.S_IFREG:
                raise SourceError("the tar archive has a sparse entry that is no regular file")
            name = extended.sparse.get(b"name") or name
            size, extents = self._pax_sparse(extended)
        mtime = header.mtime * _NANOSECONDS if extended.mtime_ns is None else extended.mtime_ns
        return Member(
            name=name,
            kind=kind,
            mode=header.mode & 0o7777,
            uid=header.uid if extended.uid is None else extended.uid,
            gid=header.gid if extended.gid is None else extended.gid,
            mtime_ns=max(-_MAX_NANOSECONDS, min(mtime, _MAX_NANOSECONDS)),
            size=size,
            stored=self._left,
            link_name=long_link or extended.link_path or header.link_name,
            major=header.major,
            minor=header.minor,
            xattrs=extended.xattrs,
            extents=extents,
        )

    def _old_sparse(self, block: bytes, header: Header) -> tuple[int, tuple[tuple[int, int], ...]]:
        if not header.is_gnu:
            raise SourceError("the tar archive has a sparse entry without GNU tar's header")
        pairs, more = gnu_sparse_map(block, first=True)
        while more:
            if len(pairs) > MAX_EXTENTS:
                raise SourceError(f"a sparse file of the tar archive has more than {MAX_EXTENTS} pieces")
            found, more = gnu_sparse_map(self._read(BLOCK), first=False)
            pairs += found
        size = gnu_real_size(block)
        return size, check_extents(pairs, size, self._left)

    def _pax_sparse(self, extended: Extended) -> tuple[int, tuple[tuple[int, int], ...]]:
        size = real_size(extended.sparse, self._left)
        if sparse_version(extended.sparse) == "1.0":
            pairs = map_from_data(self._map_block)
        else:
            pairs = map_from_records(extended.sparse)
        return size, check_extents(pairs, size, self._left)

    def _map_block(self) -> bytes:
        """A block of a sparse map, which counts as the member's contents."""
        if self._left < BLOCK:
            raise SourceError("a tar archive's sparse map is malformed")
        self._left -= BLOCK
        return self._read(BLOCK)


def _cut_short() -> SourceError:
    return SourceError("the tar archive is cut short", hint="get it again from where it came from")
