"""Sizes and durations as people write and read them. Binary prefixes (IEC 80000-13) throughout."""

from __future__ import annotations

import re

from encfs.errors import UsageError

#: Largest size that is accepted (bytes): the largest file offset.
MAX_SIZE = (1 << 63) - 1

_PREFIXES = "KMGTPE"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGTPE])(i?B)?|B)?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """A size in bytes: `65536`, `64KiB`, `64K`, `1.5GiB`, `10MB`. As in GNU coreutils `K` is `KiB`, `KB` is 1000 bytes.

    Raises: UsageError where it is no size, no whole number of bytes, or larger than a file can be.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or len(text) > 40:
        raise UsageError(f"{text[:40]!r} is not a size", hint="write it as 65536, 64KiB or 1GiB")
    number, prefix, suffix = match.groups()
    exponent = _PREFIXES.index(prefix.upper()) + 1 if prefix else 0
    factor: int = (1000 if suffix is not None and suffix.upper() == "B" else 1024) ** exponent
    whole, _, fraction = number.partition(".")
    scale: int = 10 ** len(fraction)
    size, remainder = divmod(int(whole + fraction) * factor, scale)
    if remainder:
        raise UsageError(f"{text!r} is not a whole number of bytes", hint="write it as 65536, 64KiB or 1GiB")
    if size > MAX_SIZE:
        raise UsageError(f"{text!r} is larger than any file can be", hint="write it as 65536, 64KiB or 1GiB")
    return size


def format_size(size: int) -> str:
    """`size` bytes in the largest unit that fits: `999 B`, `64 KiB`, `1.5 GiB`."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for prefix in _PREFIXES:
        value /= 1024
        if value < 1023.5 or prefix == _PREFIXES[-1]:
            break
    digits = f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
    return f"{digits.removesuffix('.0')} {prefix}iB"


def format_duration(seconds: float) -> str:
    """`80 ms`, `2.5 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"
