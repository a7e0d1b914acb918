"""Sparse members of GNU tar's PAX formats 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse Files"); its old format's
maps are in `header`. What comes out is the same for all: (offset, length) of the data, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from encfs.errors import SourceError
from encfs.tar.header import BLOCK
from encfs.tar.pax import parse_integer

#: Pieces of data that a sparse file may have.
MAX_EXTENTS: Final = 1 << 16
_MAX_SIZE: Final = (1 << 63) - 1
_LINE: Final = re.compile(rb"[0-9]{1,19}")


def sparse_version(records: Mapping[bytes, bytes]) -> str | None:
    """ "0" or "1.0", or None where the records describe no sparse file. Raises: SourceError for other versions."""
    version = records.get(b"major", b""), records.get(b"minor", b"")
    if version == (b"1", b"0"):
        return "1.0"
    if version in ((b"0", b"0"), (b"0", b"1")) or (version == (b"", b"") and records.get(b"map")):
        return "0"
    if version == (b"", b""):
        return None
    raise SourceError("a sparse file of the tar archive is of an unknown version")


def real_size(records: Mapping[bytes, bytes], stored: int) -> int:
    """The size of a sparse file with its holes. Raises: SourceError."""
    value = records.get(b"size") or records.get(b"realsize")
    return parse_integer(value) if value else stored


def map_from_records(records: Mapping[bytes, bytes]) -> list[tuple[int, int]]:
    """The map of formats 0.0 and 0.1. Raises: SourceError."""
    numbers = [parse_integer(item) for item in records.get(b"map", b"").split(b",") if item]
    count = records.get(b"numblocks")
    if len(numbers) % 2 or (count and parse_integer(count) != len(numbers) // 2):
        raise SourceError("a tar archive's sparse map is malformed")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def map_from_data(read_block: Callable[[], bytes]) -> list[tuple[int, int]]:
    """The map of format 1.0, which stands before the data in whole blocks: its count, then numbers, a line each.

    Raises: SourceError.
    """
    text = bytearray()
    position = 0

    def number() -> int:
        nonlocal position
        while (end := text.find(b"\n", position)) < 0:
            if len(text) - position > BLOCK:
                raise SourceError("a tar archive's sparse map is malformed")
            text.extend(read_block())
        line = bytes(text[position:end])
        position = end + 1
        if not _LINE.fullmatch(line):
            raise SourceError("a tar archive's sparse map is malformed")
        return int(line)

    count = number()
    if count > MAX_EXTENTS:
        raise _too_many()
    return [(number(), number()) for _ in range(count)]


def check_extents(pairs: Sequence[tuple[int, int]], size: int, stored: int) -> tuple[tuple[int, int], ...]:
    """The pieces that are not empty, if they are in order, within `size`, and make up the `stored` bytes.

    Raises: SourceError.
    """
    if len(pairs) > MAX_EXTENTS:
        raise _too_many()
    end = total = 0
    for offset, length in pairs:
        if length < 0 or offset < end or offset + length > size:
            raise SourceError("a tar archive's sparse map is malformed")
        end = offset + length
        total += length
    if total != stored or not 0 <= size <= _MAX_SIZE:
        raise SourceError("a tar archive's sparse map does not fit the data of the entry")
    return tuple((offset, length) for offset, length in pairs if length)


def _too_many() -> SourceError:
    return SourceError(f"a sparse file of the tar archive has more than {MAX_EXTENTS} pieces")
