"""Volumes: what is written comes back, by any range, in both suites; and nothing else ever does."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.errors import EncfsError, FormatError, IntegrityError, UnsupportedError
from encfs.format.descriptor import SEGMENT_TYPE, TREE_TYPE
from encfs.format.readahead import ReadAhead
from encfs.format.suite import SUITES
from encfs.format.tree import ENTRY_SIZE, FANOUT, TreeGeometry, TreeReader
from encfs.format.volume import VolumeReader
from encfs.format.writer import VolumeOptions, VolumeWriter, WrittenVolume
from encfs.oci.blobs import Descriptor
from tests.support.memory import MemoryBlob, MemoryStore

FRAME = 4096


def write(store: MemoryStore, content: bytes, **options: object) -> WrittenVolume:
    writer = VolumeWriter(store, VolumeOptions(**{"frame_size": FRAME, **options}))  # type: ignore[arg-type]
    writer.write(content)
    return writer.finish()


def open_volume(store: MemoryStore, written: WrittenVolume, suite: str = "blake3") -> VolumeReader:
    descriptor = written.descriptor
    tree = store.open_blob(Descriptor(TREE_TYPE, descriptor.tree_digest, descriptor.tree_size))
    segments = [store.open_blob(Descriptor(SEGMENT_TYPE, s.digest, s.size)) for s in descriptor.segments]
    return VolumeReader(descriptor, SUITES[suite], written.secret.key, tree, segments)


@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 128 * 4096, 128 * 4096 + 1, 300 * 4096 + 17])
def test_round_trip(suite: str, size: int) -> None:
    store, content = MemoryStore(), os.urandom(size)
    volume = open_volume(store, write(store, content, suite=SUITES[suite]), suite)
    assert volume.size == size
    assert bytes(volume.read(0, size + 100)) == content
    assert bytes(volume.read(size, 10)) == b""
    for _ in range(20):
        start = random.randrange(size + 1)
        length = random.randrange(3 * FRAME)
        assert bytes(volume.read(start, length)) == content[start : start + length]


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(0, 200_000),
    reads=st.lists(st.tuples(st.integers(0, 210_000), st.integers(0, 100_000)), max_size=8),
    frame_size=st.sampled_from([4096, 16384, 65536]),
    compress=st.booleans(),
)
def test_any_range(size: int, reads: list[tuple[int, int]], frame_size: int, compress: bool) -> None:
    store = MemoryStore()
    content = (random.Random(size).randbytes(997) * (size // 997 + 1))[:size]
    volume = open_volume(store, write(store, content, frame_size=frame_size, compress=compress))
    for offset, length in reads:
        assert bytes(volume.read(offset, length)) == content[offset : offset + length]
        buffer = bytearray(length)
        expected = content[offset : offset + length]
        assert volume.try_read_into(offset, memoryview(buffer)) == len(expected)
        assert buffer[: len(expected)] == expected


def test_segments_hold_whole_frames_and_frame_zero_comes_last() -> None:
    store, content = MemoryStore(), os.urandom(100 * FRAME)
    written = write(store, content, segment_size=10 * (FRAME + 16) + 5)
    assert [segment.frames for segment in written.descriptor.segments] == [10] * 10
    assert {segment.size for segment in written.descriptor.segments} == {10 * (FRAME + 16)}
    volume = open_volume(store, written)
    assert bytes(volume.read(0, volume.size)) == content


def test_more_frames_than_a_tree_can_have_are_refused_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("encfs.format.writer.MAX_FRAMES", 100)
    store = MemoryStore()
    write(store, bytes(100 * FRAME))
    writer = VolumeWriter(store, VolumeOptions(frame_size=FRAME))
    with pytest.raises(UnsupportedError, match="more than 100 frames") as caught:
        writer.write(bytes(16 << 20))
    assert "--frame-size" in str(caught.value.hint)
    writer.abort()


def test_set_head_replaces_the_beginning() -> None:
    for size in (100, FRAME, 9 << 20):
        store, content = MemoryStore(), os.urandom(size)
        writer = VolumeWriter(store, VolumeOptions(frame_size=FRAME))
        writer.write(content)
        writer.set_head(b"head")
        volume = open_volume(store, writer.finish())
        assert bytes(volume.read(0, size)) == b"head" + content[4:]


def test_compression_is_kept_only_where_it_pays() -> None:
    store = MemoryStore()
    content = bytes(65536) + os.urandom(65536) + b"ab" * 32768
    written = write(store, content, frame_size=65536, compress=True)
    assert written.descriptor.segments[0].size == (4096 + 16) + (65536 + 16) + (4096 + 16)
    volume = open_volume(store, written)
    assert bytes(volume.read(0, len(content))) == content


def test_opening_reads_one_piece_of_the_tree() -> None:
    store = MemoryStore()
    written = write(store, os.urandom(129 * FRAME))
    store.reads = store.bytes_fetched = 0
    open_volume(store, written)
    assert store.reads == 1
    assert store.bytes_fetched <= 32 << 10


class PartlyAtHand(MemoryBlob):
    """A blob of which the bytes before `at_hand` are there; `waits` counts the reads of others."""

    at_hand = 0
    waits = 0

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if offset + len(buffer) > self.at_hand:
            return False
        super().read_into(offset, buffer)
        return True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.waits += 1
        super().read_into(offset, buffer)


def test_nodes_that_are_at_hand_are_not_waited_for() -> None:
    store = MemoryStore()
    descriptor = write(store, os.urandom(20 * FANOUT * FRAME)).descriptor
    blob = PartlyAtHand(store, descriptor.tree_digest, descriptor.tree_size)
    tree = TreeReader(descriptor.root_input(SUITES["blake3"]), descriptor.root, blob)
    leaves = tree.geometry.levels[0]
    assert blob.waits == 1
    # What came with the first read is there.
    came = [node for node in range(leaves.nodes) if sum(leaves.span(node)) <= 64 << 10]
    assert len(came) == 10
    assert all(tree.locate(node * FANOUT, wait=False) is not None for node in came)
    assert tree.locate(len(came) * FANOUT, wait=False) is None
    # The next one is, its neighbours are not: they can wait, and come when they are asked for.
    blob.at_hand = sum(leaves.span(len(came)))
    assert tree.locate(len(came) * FANOUT) is not None
    assert blob.waits == 1
    assert tree.locate((len(came) + 1) * FANOUT) is not None
    assert blob.waits == 2
    assert tree.locate((len(came) + 2) * FANOUT, wait=False) is not None


def test_try_read_does_not_wait() -> None:
    store, content = MemoryStore(), os.urandom(3 * FRAME)
    volume = open_volume(store, write(store, content))
    store.at_hand = False
    assert volume.try_read_into(10, memoryview(bytearray(20))) is None
    assert volume.try_read_into(0, memoryview(bytearray(2 * FRAME))) is None
    volume.read(10, 20)
    assert volume.try_read_into(30, memoryview(bytearray(20))) == 20  # the frame is cached now


def test_changed_frame_is_refused_and_wipes_the_buffer() -> None:
    store, content = MemoryStore(), os.urandom(40 * FRAME)
    written = write(store, content)
    digest = written.descriptor.segments[0].digest
    blob = bytearray(store.blobs[digest])
    store.blobs[digest] = blob
    volume = open_volume(store, written)
    blob[20 * (FRAME + 16)] ^= 1  # frame 21, since frame 0 lies last
    buffer = bytearray(b"x" * 40 * FRAME)
    with pytest.raises(IntegrityError, match="frame 21"):
        volume.read_into(0, memoryview(buffer))
    assert buffer == bytes(40 * FRAME)
    assert volume.stats.failures == 1
    assert bytes(volume.read(0, 21 * FRAME)) == content[: 21 * FRAME]
    assert bytes(volume.read(22 * FRAME, 18 * FRAME)) == content[22 * FRAME :]


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_every_flipped_byte_of_tree_and_segments_is_noticed(suite: str) -> None:
    store, content = MemoryStore(), os.urandom(3 * FRAME + 100)
    written = write(store, content, suite=SUITES[suite])
    descriptor = written.descriptor
    for digest in (descriptor.tree_digest, descriptor.segments[0].digest):
        original = bytes(store.blobs[digest])
        for position in range(len(original)):
            changed = bytearray(original)
            changed[position] ^= 1 << (position % 8)
            store.blobs[digest] = changed
            with pytest.raises(EncfsError):
                open_volume(store, written, suite).read(0, len(content))
        store.blobs[digest] = original
    assert bytes(open_volume(store, written, suite).read(0, len(content))) == content


def test_swapped_and_repeated_frames_are_refused() -> None:
    store, content = MemoryStore(), os.urandom(6 * FRAME)
    written = write(store, content)
    digest = written.descriptor.segments[0].digest
    original = bytes(store.blobs[digest])
    stored = FRAME + 16
    frames = [original[start : start + stored] for start in range(0, len(original), stored)]
    for first in range(6):
        for second in range(6):
            if first == second:
                continue
            repeated = list(frames)
            repeated[first] = frames[second]
            store.blobs[digest] = b"".join(repeated)
            with pytest.raises(IntegrityError):
                open_volume(store, written).read(0, len(content))


def test_swapped_nodes_are_refused() -> None:
    store, content = MemoryStore(), os.urandom(4 * FANOUT * FRAME)
    written = write(store, content)
    geometry = TreeGeometry.of(written.descriptor.frames)
    digest = written.descriptor.tree_digest
    original = bytes(store.blobs[digest])
    spans = [geometry.levels[0].span(node) for node in range(4)]
    nodes = [original[offset : offset + size] for offset, size in spans]
    for order in ([1, 0, 2, 3], [0, 0, 2, 3], [3, 1, 2, 0], [0, 1, 3, 3]):
        store.blobs[digest] = original[: spans[0][0]] + b"".join(nodes[node] for node in order)
        with pytest.raises(IntegrityError):
            open_volume(store, written).read(0, len(content))


def test_another_volume_key_is_refused() -> None:
    store = MemoryStore()
    first, second = write(store, b"a" * 10000), write(store, b"b" * 10000)
    mixed = WrittenVolume(first.descriptor, second.secret)
    with pytest.raises(IntegrityError, match="does not authenticate"):
        open_volume(store, mixed).read(0, 10)


def test_aborted_writer_leaves_nothing() -> None:
    store = MemoryStore()
    writer = VolumeWriter(store, VolumeOptions(frame_size=FRAME, segment_size=1 << 30))
    writer.write(os.urandom(20 << 20))
    writer.abort()
    assert store.blobs == {}


@pytest.mark.parametrize("frame_size", [0, 1, 2048, 5000, 8 << 20])
def test_frame_size_is_bounded(frame_size: int) -> None:
    with pytest.raises(FormatError, match="power of two"):
        VolumeWriter(MemoryStore(), VolumeOptions(frame_size=frame_size))


@pytest.mark.parametrize("frames", [0, 1, 127, 128, 129, 16384, 16385, 1 << 28])
def test_geometry_levels_lie_top_down_without_gaps(frames: int) -> None:
    geometry = TreeGeometry.of(frames)
    position = 0
    for level in reversed(geometry.levels):
        assert level.offset == position
        position += level.size
    assert position == geometry.size
    assert geometry.levels[-1].nodes == 1
    assert geometry.levels[0].size == frames * ENTRY_SIZE


@pytest.fixture
def sequential() -> Iterator[tuple[ReadAhead, bytes]]:
    store, content = MemoryStore(), os.urandom(9 << 20)
    ahead = ReadAhead(open_volume(store, write(store, content, frame_size=65536)))
    yield ahead, content
    ahead.close()


def test_read_ahead_gives_the_same_bytes(sequential: tuple[ReadAhead, bytes]) -> None:
    ahead, content = sequential
    stream = ahead.stream(0, len(content))
    predicted = 0
    sizes = [131072, 131072, 262144] + [1 << 20] * 8 + [4096] * 10
    offset = 0
    for size in sizes:
        size = min(size, len(content) - offset)
        taken = stream.take(offset, size)
        if taken is not None and not isinstance(taken, memoryview):
            taken.result(30)
            taken = stream.take(offset, size)
        if isinstance(taken, memoryview):
            predicted += 1
            assert taken == content[offset : offset + size]
        offset += size
    assert predicted >= 6
    assert stream.take(0, 4096) is None  # not sequential any more
    stream.close()


def test_read_ahead_failure_is_left_to_the_reader(sequential: tuple[ReadAhead, bytes]) -> None:
    ahead, content = sequential
    stream = ahead.stream(0, len(content) + (1 << 20))
    segment = ahead.volume._segments[0]
    store = segment._store  # type: ignore[attr-defined]
    digest = segment._digest  # type: ignore[attr-defined]
    changed = bytearray(store.blobs[digest])
    changed[3 << 20] ^= 1
    store.blobs[digest] = changed
    results = []
    for offset in range(0, 6 << 20, 1 << 20):
        taken = stream.take(offset, 1 << 20)
        if taken is not None and not isinstance(taken, memoryview):
            assert taken.exception(30) is None or isinstance(taken.exception(), IntegrityError)
            taken = stream.take(offset, 1 << 20)
        if isinstance(taken, memoryview):
            assert taken == content[offset : offset + (1 << 20)]
        results.append(taken is None)
    assert results[3]
    stream.close()


class CachedCopy(MemoryBlob):
    """A blob with a copy of some of its bytes, which was changed by somebody, until it is discarded."""

    def __init__(self, store: MemoryStore, digest: str, size: int, changed: int) -> None:
        super().__init__(store, digest, size)
        self.changed = changed

    def read_into(self, offset: int, buffer: memoryview) -> None:
        super().read_into(offset, buffer)
        if offset <= self.changed < offset + len(buffer):
            buffer[self.changed - offset] ^= 1

    def discard(self, offset: int, size: int) -> bool:
        if offset <= self.changed < offset + size:
            self.changed = -1
        return True


def test_a_changed_copy_of_any_part_of_the_tree_is_read_again() -> None:
    store, content = MemoryStore(), os.urandom((FANOUT * FANOUT + 1) * FRAME)
    written = write(store, content)
    descriptor = written.descriptor
    geometry = TreeGeometry.of(descriptor.frames)
    assert len(geometry.levels) == 3
    for offset in {
        0,
        *(level.offset for level in geometry.levels),
        *(level.span(1)[0] for level in geometry.levels[:2]),
    }:
        tree = CachedCopy(store, descriptor.tree_digest, descriptor.tree_size, offset)
        segments = [store.open_blob(Descriptor(SEGMENT_TYPE, s.digest, s.size)) for s in descriptor.segments]
        volume = VolumeReader(descriptor, SUITES["blake3"], written.secret.key, tree, segments)
        for frame in (0, FANOUT, descriptor.frames - 1):
            assert bytes(volume.read(frame * FRAME, FRAME)) == content[frame * FRAME : (frame + 1) * FRAME]
        assert tree.changed == -1
