"""Fresh memory, and pages that are taken in batches."""

from __future__ import annotations

import mmap

import pytest

from encfs.memory import fresh_bytes, populate


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_pages_are_there_after_populating() -> None:
    size = 64 << 20
    memory = fresh_bytes(size)
    before = _resident()
    populate(memoryview(memory))
    assert _resident() - before > size // 2
    assert memory[:16] == bytes(16)


@pytest.mark.parametrize(("start", "stop"), [(1, 8192), (0, 1), (4095, 4097), (5, 5 + 3 * 4096)])
def test_content_stays_also_where_pages_are_shared_with_others(start: int, stop: int) -> None:
    memory = bytearray(range(256)) * 64
    before = bytes(memory)
    populate(memoryview(memory)[start:stop])
    assert memory == before


def test_more_memory_than_there_is_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        fresh_bytes(1 << 60)
