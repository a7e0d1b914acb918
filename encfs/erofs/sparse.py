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
    """How a file is stored: `ranges` are its stored byte ranges (start, end) in order.

    Each starts on a chunk of 2^`chunk_bits` bytes, and ends on one or on the last block of the file. `index_size` is
    the size of the block map in bytes: 0 where no hole is left, and the file needs no chunks.
    """

    chunk_bits: int
    ranges: tuple[tuple[int, int], ...]
    index_size: int

    @property
    def cost(self) -> int:
        """Bytes in the image."""
        return self.index_size + sum(end - start for start, end in self.ranges)


def plan_chunks(size: int, extents: Sequence[tuple[int, int]]) -> ChunkPlan:
    """The plan that stores the fewest bytes for a file of `size` > 0 bytes whose data are `extents` (offset, length).

    The extents are in order, do not overlap, and lie within the file.
    """
    best = _plan(size, extents, BLOCK_BITS)
    for bits in range(BLOCK_BITS + 1, BLOCK_BITS + CHUNK_BITS_MASK + 1):
        # Larger chunks never store less; they only shorten the index.
        if best.index_size <= CHUNK_BLOCK.size:
            break
        plan = _plan(size, extents, bits)
        if plan.cost < best.cost:
            best = plan
        elif plan.cost - plan.index_size >= best.cost:
            break
    return best


def _plan(size: int, extents: Sequence[tuple[int, int]], bits: int) -> ChunkPlan:
    ranges = _stored_ranges(size, extents, 1 << bits)
    dense = ranges == ((0, align(size, BLOCK_SIZE)),)
    return ChunkPlan(bits, ranges, 0 if dense else CHUNK_BLOCK.size * -(-size >> bits))


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
