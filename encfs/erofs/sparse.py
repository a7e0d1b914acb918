"""How a sparse file is cut into chunks: which chunk size costs least, and which ranges are then stored.

EROFS keeps holes only as whole chunks, all of one size per file. A small chunk stores little of the holes but needs a
long index; a large one the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from encfs.erofs.structures import BLOCK_BITS, BLOCK_SIZE, CHUNK_BITS_MASK, CHUNK_BLOCK, align


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """`chunk_bits` is log2 of the chunk size in bytes; `ranges` are the stored byte ranges (start, end) in order, each
    starting on a chunk and ending on one or on the last block of the file. One range over everything: no hole is
    left."""

    chunk_bits: int
    ranges: tuple[tuple[int, int], ...]
    index_size: int


def plan_chunks(size: int, extents: Sequence[tuple[int, int]]) -> ChunkPlan:
    """The plan that stores the fewest bytes for a file of `size` bytes whose data are `extents` (offset, length).

    The extents are in order, do not touch one another's bytes, and lie within the file.
    """
    best: ChunkPlan | None = None
    best_cost = 0
    for bits in range(BLOCK_BITS, BLOCK_BITS + CHUNK_BITS_MASK + 1):
        ranges = _stored_ranges(size, extents, 1 << bits)
        stored = sum(end - start for start, end in ranges)
        index_size = CHUNK_BLOCK.size * -(-size >> bits)
        if best is None or stored + index_size < best_cost:
            best, best_cost = ChunkPlan(bits, ranges, index_size), stored + index_size
        # Larger chunks never store less, so their cost is at least `stored`.
        if stored >= best_cost or index_size == CHUNK_BLOCK.size:
            break
    if best is None:
        raise AssertionError("the loop runs at least once")
    return best


def _stored_ranges(size: int, extents: Sequence[tuple[int, int]], chunk: int) -> tuple[tuple[int, int], ...]:
    limit = align(size, BLOCK_SIZE)
    ranges: list[tuple[int, int]] = []
    last_end = -1
    for offset, length in extents:
        start = offset & -chunk
        end = min(align(offset + length, chunk), limit)
        if start <= last_end:
            start = ranges.pop()[0]
        ranges.append((start, end))
        last_end = end
    return tuple(ranges)
