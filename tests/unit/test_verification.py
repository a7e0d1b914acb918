"""Verification without a key: every byte, every node, and frames that tile the segments exactly."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from encfs.encoding import sha256_digest
from encfs.errors import FormatError, IntegrityError
from encfs.format import verification
from encfs.format.descriptor import SEGMENT_TYPE, TREE_TYPE, SegmentDescriptor, VolumeDescriptor
from encfs.format.suite import SUITES
from encfs.format.tree import ENTRY_SIZE, FANOUT, FrameLocation, TreeGeometry, leaf_hash, pack_entry, write_tree
from encfs.format.verification import VolumeCheck, verify_volume
from encfs.format.writer import VolumeOptions, VolumeWriter
from encfs.oci.blobs import Descriptor
from encfs.progress import NoProgress
from tests.support.memory import MemoryStore, MemoryWriter

FRAME, STORED = 4096, 4096 + 16
SUITE = SUITES["blake3"]


def check(store: MemoryStore, volume: VolumeDescriptor, suite: str = "blake3") -> VolumeCheck:
    tree = store.open_blob(Descriptor(TREE_TYPE, volume.tree_digest, volume.tree_size))
    segments = [store.open_blob(Descriptor(SEGMENT_TYPE, item.digest, item.size)) for item in volume.segments]
    return verify_volume(volume, SUITES[suite], tree, segments, NoProgress())


def write(frames: int, **options: object) -> tuple[MemoryStore, VolumeDescriptor]:
    store = MemoryStore()
    writer = VolumeWriter(store, VolumeOptions(frame_size=FRAME, **options))  # type: ignore[arg-type]
    writer.write(os.urandom(frames * FRAME))
    return store, writer.finish().descriptor


@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("frames", [0, 1, 2, 127, 128, 129, 300, 2500])
def test_what_was_written_verifies(suite: str, frames: int) -> None:
    store, volume = write(frames, suite=SUITES[suite])
    assert check(store, volume, suite) == VolumeCheck(frames, volume.stored_size)


def test_many_segments_verify() -> None:
    store, volume = write(100, segment_size=10 * STORED)
    assert len(volume.segments) == 10
    assert check(store, volume).frames == 100


def test_every_byte_is_looked_at() -> None:
    store, volume = write(2)
    for digest in (volume.tree_digest, volume.segments[0].digest):
        original = bytes(store.blobs[digest])
        changed = bytearray(original)
        store.blobs[digest] = changed
        for position in range(0, len(original), 7 if len(original) > 1000 else 1):
            changed[position] ^= 1 << position % 8
            with pytest.raises(IntegrityError):
                check(store, volume)
            changed[position] = original[position]
        assert check(store, volume).frames == 2


def test_every_node_of_a_large_tree_is_looked_at() -> None:
    store, volume = write(3 * FANOUT)
    geometry = TreeGeometry.of(volume.frames)
    original = bytes(store.blobs[volume.tree_digest])
    for level in geometry.levels:
        for node in range(level.nodes):
            offset, size = level.span(node)
            for position in (offset, offset + size - 1):
                changed = bytearray(original)
                changed[position] ^= 1
                store.blobs[volume.tree_digest] = changed
                with pytest.raises(IntegrityError):
                    check(store, volume)


def test_a_flipped_byte_in_each_of_many_segments_is_found() -> None:
    store, volume = write(40, segment_size=10 * STORED)
    for segment in volume.segments:
        original = bytes(store.blobs[segment.digest])
        for position in (0, len(original) // 2, len(original) - 1):
            changed = bytearray(original)
            changed[position] ^= 1
            store.blobs[segment.digest] = changed
            with pytest.raises(IntegrityError):
                check(store, volume)
        store.blobs[segment.digest] = original
    assert check(store, volume).frames == 40


# -- volumes whose owner made them wrong: every hash fits, the layout does not


@dataclass(slots=True)
class Crafted:
    """A volume made by hand: level-0 entries and the segments' bytes."""

    segments: list[bytes]
    entries: list[FrameLocation]
    frames: list[int]

    def build(self) -> tuple[MemoryStore, VolumeDescriptor]:
        store = MemoryStore()
        descriptors = []
        for content, frames in zip(self.segments, self.frames, strict=True):
            blob = store.write_blob(content, SEGMENT_TYPE)
            descriptors.append(SegmentDescriptor(blob.digest, blob.size, frames))
        count = len(self.entries)
        volume = VolumeDescriptor(
            bytes(16),
            "erofs",
            count * FRAME,
            FRAME,
            count,
            bytes(32),
            sha256_digest(b""),
            count * ENTRY_SIZE,
            tuple(descriptors),
        )
        writer = MemoryWriter(store)
        root = write_tree(volume.root_input(SUITE), io.BytesIO(b"".join(map(pack_entry, self.entries))), writer)
        return store, replace(volume, root=root, tree_digest=writer.commit(TREE_TYPE).digest)


def test_frames_out_of_order_are_remembered_up_to_a_bound_for_all_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each of three segments the second frame comes first: three are remembered."""
    segments = [os.urandom(2 * STORED) for _ in range(3)]
    entries = []
    for index in range(6):
        segment, offset = index % 3, STORED if index < 3 else 0
        stored = segments[segment][offset : offset + STORED]
        entries.append(FrameLocation(leaf_hash(SUITE, index, stored), offset, STORED, segment, 0))
    store, volume = Crafted(segments, entries, [2, 2, 2]).build()
    monkeypatch.setattr(verification, "_MAX_SCATTERED", 3)
    assert check(store, volume).frames == 6
    monkeypatch.setattr(verification, "_MAX_SCATTERED", 2)
    with pytest.raises(FormatError, match="scattered beyond measure"):
        check(store, volume)


def craft() -> Crafted:
    """Two segments of two frames each, in order. The frames need not decrypt: nobody here has a key."""
    segments = [os.urandom(2 * STORED) for _ in range(2)]
    entries = []
    for index in range(4):
        offset = index % 2 * STORED
        stored = segments[index // 2][offset : offset + STORED]
        entries.append(FrameLocation(leaf_hash(SUITE, index, stored), offset, STORED, index // 2, 0))
    return Crafted(segments, entries, [2, 2])


def relocate(crafted: Crafted, index: int, **fields: Any) -> None:
    """Let a frame lie elsewhere, its leaf made to fit."""
    entry = crafted.entries[index]._replace(**fields)
    place = crafted.segments[min(entry.segment, 1)][entry.offset : entry.offset + entry.stored]
    crafted.entries[index] = entry._replace(leaf=leaf_hash(SUITE, index, place))


def gap(crafted: Crafted) -> None:
    crafted.segments[0] += b"hidden"


def gap_between(crafted: Crafted) -> None:
    crafted.segments[0] = crafted.segments[0][:STORED] + b"hidden" + crafted.segments[0][STORED:]
    relocate(crafted, 1, offset=STORED + 6)


def gap_before(crafted: Crafted) -> None:
    crafted.segments[0] = b"hidden" + crafted.segments[0]
    relocate(crafted, 0, offset=6)
    relocate(crafted, 1, offset=STORED + 6)


def overlap(crafted: Crafted) -> None:
    relocate(crafted, 1, offset=STORED - 1)


def twice(crafted: Crafted) -> None:
    relocate(crafted, 1, offset=0)


def wrong_counts(crafted: Crafted) -> None:
    crafted.frames = [1, 3]


def outside(crafted: Crafted) -> None:
    relocate(crafted, 1, offset=STORED + 1)


def beyond_all_segments(crafted: Crafted) -> None:
    relocate(crafted, 1, segment=2)


def unknown_flag(crafted: Crafted) -> None:
    relocate(crafted, 1, flags=2)


def too_small(crafted: Crafted) -> None:
    relocate(crafted, 1, stored=STORED - 1)


def compressed_without_gain(crafted: Crafted) -> None:
    relocate(crafted, 1, flags=1)


def test_the_crafted_volume_verifies() -> None:
    assert check(*craft().build()).frames == 4


def test_frames_may_be_stored_in_any_order() -> None:
    crafted = craft()
    for index, (segment, offset) in enumerate([(1, STORED), (0, STORED), (1, 0), (0, 0)]):
        relocate(crafted, index, segment=segment, offset=offset)
    assert check(*crafted.build()).frames == 4


@pytest.mark.parametrize(
    "change",
    [
        gap,
        gap_between,
        gap_before,
        overlap,
        twice,
        wrong_counts,
        outside,
        beyond_all_segments,
        unknown_flag,
        too_small,
        compressed_without_gain,
    ],
    ids=lambda change: change.__name__,
)
def test_frames_that_do_not_tile_the_segments_are_refused(change: Callable[[Crafted], None]) -> None:
    crafted = craft()
    change(crafted)
    store, volume = crafted.build()
    with pytest.raises(FormatError):
        check(store, volume)
