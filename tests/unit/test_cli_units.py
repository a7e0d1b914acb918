"""Sizes and durations as people write and read them."""

from __future__ import annotations

import pytest

from encfs.errors import UsageError
from encfs.units import MAX_SIZE, format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("65536", 65536),
        ("12B", 12),
        ("64KiB", 64 << 10),
        ("64 KiB", 64 << 10),
        ("64K", 64 << 10),
        ("64kib", 64 << 10),
        ("64KB", 64_000),
        ("1.5GiB", 3 << 29),
        ("1GiB", 1 << 30),
        ("2T", 2 << 40),
        ("0.5KiB", 512),
        (" 1MiB ", 1 << 20),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "KiB", "-1", "1.5", "0.3KiB", "1e6", "0x10", "64KiBB", "64Ki", "1,5GiB", "12 34", "8EiB", "١KiB", "1" * 41],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (1 << 20, "1 MiB"),
        ((1 << 20) - 1, "1 MiB"),
        (123 << 20, "123 MiB"),
        (MAX_SIZE, "8 EiB"),
    ],
)
def test_sizes_are_shown(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0804, "80 ms"),
        (0.9999, "1.0 s"),
        (2.54, "2.5 s"),
        (12.3, "12 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations_are_shown(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
