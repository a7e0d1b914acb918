"""Chunk plans: everything stored, holes kept where that pays, never worse than any other chunk size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from encfs.erofs.sparse import plan_chunks

BLOCK = 4096


@st.composite
def sparse_files(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """Size and extents of a file."""
    unit = draw(st.sampled_from([1, 512, 4096, 65536]))
    size = draw(st.integers(1, 1 << 12)) * unit
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=12)))
    extents = [(start, end - start) for start, end in zip(cuts[::2], cuts[1::2], strict=False)]
    return size, extents


def rounded(size: int, extents: list[tuple[int, int]], chunk: int) -> int:
    """Bytes stored with a chunk size, counted chunk by chunk."""
    limit = -(-size // BLOCK) * BLOCK
    chunks = {
        index for offset, length in extents for index in range(offset // chunk, (offset + length - 1) // chunk + 1)
    }
    return sum(min((index + 1) * chunk, limit) - index * chunk for index in chunks)


@given(sparse_files())
def test_plan_covers_all_data_and_costs_least(file: tuple[int, list[tuple[int, int]]]) -> None:
    size, extents = file
    plan = plan_chunks(size, extents)
    chunk = 1 << plan.chunk_bits
    limit = -(-size // BLOCK) * BLOCK
    end = -1
    for start, stop in plan.ranges:
        assert end < start < stop <= limit
        assert start % chunk == 0
        assert stop % chunk == 0 or stop == limit
        end = stop
    for offset, length in extents:
        assert any(start <= offset and offset + length <= stop for start, stop in plan.ranges)
    for start, stop in plan.ranges:
        assert any(start < offset + length and offset < stop for offset, length in extents)
    assert plan.index_size == (0 if plan.ranges == ((0, limit),) else 4 * -(-size // chunk))
    cost = plan.index_size + sum(stop - start for start, stop in plan.ranges)
    assert cost <= limit
    for bits in range(12, 44):
        assert cost <= 4 * -(-size >> bits) + rounded(size, extents, 1 << bits)


def test_dense_file_is_one_range() -> None:
    for extents in ([(0, 10_000)], [(0, 4000), (4000, 6000)], [(0, 1), (5000, 5000)]):
        plan = plan_chunks(10_000, extents)
        assert plan.ranges == ((0, 12288),)
        assert plan.index_size == 0
        assert plan.cost == 12288


def test_huge_hole_needs_no_long_index() -> None:
    plan = plan_chunks(1 << 62, [])
    assert plan.ranges == ()
    assert plan.index_size <= 4 << 20
    assert plan_chunks(1 << 40, []).index_size == 4


def test_tiny_hole_in_a_large_file_is_filled() -> None:
    size = 1 << 30
    assert plan_chunks(size, [(0, 4096), (8192, size - 8192)]).ranges == ((0, size),)
