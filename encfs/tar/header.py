"""One header block of a tar archive: tables of fields, numbers and texts (POSIX.1-2024 pax, ustar; GNU tar's tar.h).

Not here: what follows from several headers together (`reader`), extended headers (`pax`), sparse maps (`sparse`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from encfs.errors import SourceError

BLOCK: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK)

#: Offset and size (bytes) of every field.
_NAME: Final = (0, 100)
_MODE: Final = (100, 8)
_UID: Final = (108, 8)
_GID: Final = (116, 8)
_SIZE: Final = (124, 12)
_MTIME: Final = (136, 12)
_CHECKSUM: Final = (148, 8)
_TYPE: Final = (156, 1)
_LINK_NAME: Final = (157, 100)
_MAGIC: Final = (257, 6)
_MAGIC_AND_VERSION: Final = (257, 8)
_MAJOR: Final = (329, 8)
_MINOR: Final = (337, 8)
_PREFIX: Final = (345, 155)
#: Schilling's star: a shorter prefix, and a mark at the end.
_STAR_PREFIX: Final = (345, 131)
_STAR_MARK: Final = (508, 4)
#: GNU tar's sparse map: pairs of offset and length, whether a block of more follows, the size of the file.
_GNU_SPARSE: Final = (386, 4)
_GNU_MORE: Final = 482
_GNU_REAL_SIZE: Final = (483, 12)
#: A block of nothing but pairs.
_MORE_SPARSE: Final = (0, 21)
_MORE_MORE: Final = 504
_NUMBER: Final = 12

_USTAR: Final = b"ustar\0"
_GNU: Final = b"ustar  \0"
_OCTAL: Final = re.compile(rb"[0-7]+")


@dataclass(frozen=True, slots=True)
class Header:
    """One header block. `kind` is the type flag; `size` as it stands there, whether or not contents follow."""

    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link_name: bytes
    major: int
    minor: int
    is_gnu: bool


def parse_header(block: bytes) -> Header:
    """Raises: SourceError where checksum or a number is wrong."""
    _check_sum(block)
    magic = _field(block, _MAGIC)
    is_gnu = _field(block, _MAGIC_AND_VERSION) == _GNU
    name = _text(block, _NAME)
    if magic == _USTAR:
        star = _field(block, _STAR_MARK) == b"tar\0"
        prefix = _text(block, _STAR_PREFIX if star else _PREFIX)
        if prefix:
            name = prefix + b"/" + name
    has_devices = magic == _USTAR or is_gnu
    return Header(
        name=name,
        kind=_field(block, _TYPE),
        mode=_integer(block, _MODE, "mode"),
        uid=_integer(block, _UID, "owner"),
        gid=_integer(block, _GID, "group"),
        size=_integer(block, _SIZE, "size"),
        mtime=_integer(block, _MTIME, "time"),
        link_name=_text(block, _LINK_NAME),
        major=_integer(block, _MAJOR, "device") if has_devices else 0,
        minor=_integer(block, _MINOR, "device") if has_devices else 0,
        is_gnu=is_gnu,
    )


def gnu_real_size(block: bytes) -> int:
    """The size of a sparse file from GNU tar's old header. Raises: SourceError."""
    return _integer(block, _GNU_REAL_SIZE, "size")


def gnu_sparse_map(block: bytes, *, first: bool) -> tuple[list[tuple[int, int]], bool]:
    """(offset, length) pairs of a header block, or of a block that follows it; whether one more does.

    Raises: SourceError.
    """
    start, count = _GNU_SPARSE if first else _MORE_SPARSE
    pairs = []
    for position in range(start, start + count * 2 * _NUMBER, 2 * _NUMBER):
        # The first entry that begins with a NUL ends the map, for GNU tar and libarchive as well.
        if not block[position]:
            break
        offset = _integer(block, (position, _NUMBER), "sparse map")
        length = _integer(block, (position + _NUMBER, _NUMBER), "sparse map")
        pairs.append((offset, length))
    return pairs, bool(block[_GNU_MORE if first else _MORE_MORE])


def _field(block: bytes, place: tuple[int, int]) -> bytes:
    return block[place[0] : place[0] + place[1]]


def _text(block: bytes, place: tuple[int, int]) -> bytes:
    return _field(block, place).partition(b"\0")[0]


def _integer(block: bytes, place: tuple[int, int], what: str) -> int:
    """Octal digits, or a big-endian two's complement number where the first bit is set (GNU, star)."""
    field = _field(block, place)
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40:
            value -= 0x80 << 8 * (len(field) - 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise SourceError(f"a tar header's {what} is out of range")
        return value
    digits = field.strip(b" \0").partition(b"\0")[0]
    if not digits:
        return 0
    if not _OCTAL.fullmatch(digits):
        raise SourceError(f"a tar header's {what} is no number")
    return int(digits, 8)


def _check_sum(block: bytes) -> None:
    start, size = _CHECKSUM
    stated = _integer(block, _CHECKSUM, "checksum")
    rest = block[:start] + b" " * size + block[start + size :]
    # Some old tools summed signed characters.
    signed = sum(rest) - 256 * sum(byte > 127 for byte in rest)
    if stated not in (sum(rest), signed):
        raise SourceError("a tar header's checksum is wrong", hint="the archive is damaged; get it again")
