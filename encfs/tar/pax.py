"""Extended headers (POSIX.1-2024 pax, "pax Extended Header"): records of keyword and value, and what they override.

Sparse files of GNU tar's PAX formats are read from them in `sparse`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from encfs.errors import SourceError

#: Bytes of one extended header, or of a long name; as many as Go's archive/tar reads.
MAX_EXTENDED_SIZE: Final = 1 << 20

SPARSE_PREFIX: Final = b"GNU.sparse."
_SPARSE_PAIR: Final = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_XATTR_PREFIX: Final = b"SCHILY.xattr."
_NANOSECONDS: Final = 1_000_000_000
#: What a global header must not set: GNU tar applies it to what follows, container tools do not.
_MEANINGFUL: Final = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"hdrcharset")

_LENGTH: Final = re.compile(rb"([0-9]{1,7}) ")
_INTEGER: Final = re.compile(rb"-?[0-9]{1,19}")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,18})(?:\.([0-9]*))?")


@dataclass(frozen=True, slots=True)
class Extended:
    """What extended headers say of the next member. None and empty: nothing."""

    path: bytes | None = None
    link_path: bytes | None = None
    size: int | None = None
    uid: int | None = None
    gid: int | None = None
    mtime_ns: int | None = None
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    #: Records of GNU tar's sparse formats without their prefix; `map` of pairs whatever their version.
    sparse: Mapping[bytes, bytes] = field(default_factory=dict)


def parse_extended(content: bytes) -> Extended:
    """The records of one extended header, later ones before earlier ones. Raises: SourceError."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    for keyword, value in _records(content):
        if keyword in _SPARSE_PAIR:
            if keyword != _SPARSE_PAIR[len(pairs) % 2] or b"," in value:
                raise SourceError("a tar archive's sparse map is malformed")
            pairs.append(value)
        else:
            records[keyword] = value
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    # An empty value takes back what a global header said, and none of those counts.
    return Extended(
        path=_name(records, b"path"),
        link_path=_name(records, b"linkpath"),
        size=_integer(records, b"size"),
        uid=_integer(records, b"uid"),
        gid=_integer(records, b"gid"),
        mtime_ns=_time(records, b"mtime"),
        xattrs=tuple(
            (keyword.removeprefix(_XATTR_PREFIX), value)
            for keyword, value in records.items()
            if keyword.startswith(_XATTR_PREFIX)
        ),
        sparse={
            keyword.removeprefix(SPARSE_PREFIX): value
            for keyword, value in records.items()
            if keyword.startswith(SPARSE_PREFIX)
        },
    )


def check_global(content: bytes) -> None:
    """Raises: SourceError where a global header would change the members that follow, for some readers."""
    for keyword, value in _records(content):
        if value and (keyword in _MEANINGFUL or keyword.startswith((SPARSE_PREFIX, _XATTR_PREFIX))):
            raise SourceError(
                f"a global header of the tar archive sets {ascii(keyword)[2:-1][:40]}, which tools read differently",
                hint="write the archive again with the attributes at each entry",
            )


def _records(content: bytes) -> list[tuple[bytes, bytes]]:
    found = []
    position = 0
    while position < len(content):
        match = _LENGTH.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise SourceError("an extended header of the tar archive is malformed")
        keyword, equals, value = content[match.end() : end - 1].partition(b"=")
        if not keyword or not equals or b"\0" in keyword:
            raise SourceError("an extended header of the tar archive is malformed")
        found.append((keyword, value))
        position = end
    return found


def _name(records: Mapping[bytes, bytes], keyword: bytes) -> bytes | None:
    value = records.get(keyword)
    if value and b"\0" in value:
        raise SourceError("a name in an extended header of the tar archive has a NUL byte")
    return value or None


def _integer(records: Mapping[bytes, bytes], keyword: bytes) -> int | None:
    value = records.get(keyword)
    return None if not value else parse_integer(value)


def parse_integer(value: bytes) -> int:
    """A decimal number of 64 bits. Raises: SourceError."""
    if not _INTEGER.fullmatch(value) or not -(1 << 63) <= int(value) < 1 << 63:
        raise SourceError("a number in an extended header of the tar archive is malformed")
    return int(value)


def _time(records: Mapping[bytes, bytes], keyword: bytes) -> int | None:
    """Seconds with a fraction, as nanoseconds; what is finer is cut off."""
    value = records.get(keyword)
    if not value:
        return None
    match = _TIME.fullmatch(value)
    if match is None:
        raise SourceError("a time in an extended header of the tar archive is malformed")
    fraction = int((match[3] or b"")[:9].ljust(9, b"0"))
    nanoseconds = int(match[2]) * _NANOSECONDS + fraction
    return -nanoseconds if match[1] else nanoseconds
