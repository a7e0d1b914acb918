"""Extended attributes as EROFS stores them: one area per inode, optionally with entries shared between inodes.

The writer stores every attribute inline; the reader also understands shared entries, which other tools write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from encfs.erofs.structures import (
    MAX_NAME,
    MAX_XATTR_AREA,
    XATTR_ALIGNMENT,
    XATTR_ENTRY,
    XATTR_HEADER,
    XATTR_PREFIXES,
    XATTR_SHARED_ID,
    align,
    printable,
)
from encfs.errors import FormatError, SourceError

_MAX_VALUE = 0xFFFF


def encode_xattrs(path: bytes, xattrs: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The xattr area of one inode, b"" without attributes. Sorted by name: the order given does not matter.

    Raises: SourceError naming `path` where a name or value cannot be represented, or all of them together cannot.
    """
    if not xattrs:
        return b""
    area = bytearray(XATTR_HEADER.pack(0, 0))
    previous: bytes | None = None
    for name, value in sorted(xattrs):
        if name == previous:
            raise SourceError(f"{printable(path)}: extended attribute {printable(name)} is given twice")
        previous = name
        index, suffix = _split_name(path, name)
        if len(value) > _MAX_VALUE:
            raise SourceError(
                f"{printable(path)}: extended attribute {printable(name)} has {len(value)} bytes",
                hint=f"EROFS keeps at most {_MAX_VALUE}",
            )
        area += XATTR_ENTRY.pack(len(suffix), index, len(value))
        area += suffix
        area += value
        area += bytes(-len(area) % XATTR_ALIGNMENT)
        if len(area) > MAX_XATTR_AREA:
            raise SourceError(f"{printable(path)}: extended attributes need more than {MAX_XATTR_AREA} bytes")
    return bytes(area)


def _split_name(path: bytes, name: bytes) -> tuple[int, bytes]:
    for index, prefix in XATTR_PREFIXES.items():
        if prefix.endswith(b"."):
            if name.startswith(prefix) and 0 < len(name) - len(prefix) <= MAX_NAME and b"\0" not in name:
                return index, name[len(prefix) :]
        elif name == prefix:
            return index, b""
    raise SourceError(
        f"{printable(path)}: extended attribute {printable(name)} cannot be kept in EROFS",
        hint="it keeps user.*, trusted.*, security.* and the two POSIX ACLs",
    )


def decode_xattrs(area: bytes, read_shared: Callable[[int, int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Names with their prefix, and values, of one inode's xattr area.

    `read_shared(offset, size)` reads from the area of shared entries (bytes). Attributes of an unknown kind are left
    out, as the kernel does. Raises FormatError where the area contradicts itself.
    """
    _filter, shared = XATTR_HEADER.unpack_from(area)
    position = XATTR_HEADER.size + XATTR_SHARED_ID.size * shared
    if position > len(area):
        raise FormatError("EROFS xattr area is shorter than its list of shared entries")
    for (number,) in XATTR_SHARED_ID.iter_unpack(area[XATTR_HEADER.size : position]):
        offset = number * XATTR_ALIGNMENT
        name_size, index, value_size = XATTR_ENTRY.unpack(read_shared(offset, XATTR_ENTRY.size))
        body = read_shared(offset + XATTR_ENTRY.size, name_size + value_size)
        if index in XATTR_PREFIXES:
            yield _join_name(index, body[:name_size]), body[name_size:]
    while position < len(area):
        if position + XATTR_ENTRY.size > len(area):
            raise FormatError("EROFS xattr entry crosses the end of its area")
        name_size, index, value_size = XATTR_ENTRY.unpack_from(area, position)
        start = position + XATTR_ENTRY.size
        end = start + name_size + value_size
        if end > len(area):
            raise FormatError("EROFS xattr entry crosses the end of its area")
        if index in XATTR_PREFIXES:
            yield _join_name(index, area[start : start + name_size]), area[start + name_size : end]
        position = align(end, XATTR_ALIGNMENT)


def decode_inline_xattrs(area: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The attributes of an area as `encode_xattrs` makes it, which shares none."""

    def refuse(offset: int, size: int) -> bytes:
        raise FormatError("EROFS xattr area refers to shared entries")

    return decode_xattrs(area, refuse) if area else iter(())


def _join_name(index: int, suffix: bytes) -> bytes:
    prefix = XATTR_PREFIXES[index]
    if prefix.endswith(b".") != bool(suffix) or b"\0" in suffix:
        raise FormatError("EROFS xattr entry has an impossible name")
    return prefix + suffix
