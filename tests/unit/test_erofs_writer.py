"""The writer: layout on disk, what is refused, order, memory and temporary storage."""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from encfs.erofs.structures import BLOCK_SIZE, LAYOUT_CHUNKED, LAYOUT_INLINE, LAYOUT_PLAIN, MAX_PATH, printable
from encfs.erofs.walk import walk
from encfs.erofs.writer import Entry, ErofsWriter
from encfs.errors import SourceError
from tests.support.images import TEST_UUID, FileSink, Item, fsck, open_image, write_image
from tests.support.trees import scan_image

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
LINK = stat.S_IFLNK | 0o777
ROOT: Item = (Entry(b"", DIRECTORY), b"")


def file(path: bytes, content: bytes = b"", **fields: object) -> Item:
    return Entry(path, FILE, size=len(content), **fields), content  # type: ignore[arg-type]


def directory(path: bytes) -> Item:
    return Entry(path, DIRECTORY), b""


def test_empty_image_has_a_superblock_and_a_root(tmp_path: Path) -> None:
    summary = write_image(tmp_path / "image", [ROOT])
    assert summary == type(summary)(size=2 * BLOCK_SIZE, inodes=1, names=1, data_size=0, metadata_offset=BLOCK_SIZE)
    content = (tmp_path / "image").read_bytes()
    assert len(content) == summary.size
    # root inode: nid 1, compact, inline, mode, two links, 27 bytes of entries
    assert struct.unpack_from("<HHHHI", content, BLOCK_SIZE + 32) == (LAYOUT_INLINE << 1, 0, DIRECTORY, 2, 27)
    fsck(tmp_path / "image")


def test_data_come_first_in_the_order_of_adding_then_metadata(tmp_path: Path) -> None:
    items = [file(b"z", b"z" * 5000), ROOT, file(b"d/a", b"a"), directory(b"d"), file(b"b", b"b" * 4096)]
    summary = write_image(tmp_path / "image", items)
    content = (tmp_path / "image").read_bytes()
    assert summary.metadata_offset == 5 * BLOCK_SIZE
    assert content[BLOCK_SIZE : 3 * BLOCK_SIZE] == (b"z" * 5000).ljust(2 * BLOCK_SIZE, b"\0")
    assert content[3 * BLOCK_SIZE : 4 * BLOCK_SIZE] == b"a".ljust(BLOCK_SIZE, b"\0")
    assert content[4 * BLOCK_SIZE : 5 * BLOCK_SIZE] == b"b" * BLOCK_SIZE
    assert content[1024 + 48 : 1024 + 64] == TEST_UUID
    assert summary.data_size == 5000 + 1 + 4096


def test_large_files_begin_at_multiples_of_the_alignment(tmp_path: Path) -> None:
    alignment = 4 * BLOCK_SIZE
    large, small = os.urandom(32 * alignment + 1), os.urandom(32 * alignment - BLOCK_SIZE)
    with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID, alignment=alignment) as writer:
        writer.add(Entry(b"", DIRECTORY))
        for name, content in ((b"1-small", small), (b"2-large", large), (b"3-large", large)):
            writer.add(Entry(name, FILE, size=len(content)), io.BytesIO(content))
        # Large, but hardly anything of it is stored.
        writer.add(Entry(b"4-sparse", FILE, size=100 * alignment), io.BytesIO(b"x"), [(50 * alignment, 1)])
        summary = writer.finish()
    assert summary.data_size == len(small) + 2 * len(large) + 1
    fsck(tmp_path / "image")
    with open_image(tmp_path / "image") as tree:
        starts = {}
        for path, inode in walk(tree, tree.inode(tree.root)):
            if stat.S_ISREG(inode.mode):
                (starts[path],) = [place for place, _length in tree.extents(inode, 0, inode.size) if place is not None]
    assert starts[b"1-small"] == BLOCK_SIZE
    assert starts[b"2-large"] % alignment == starts[b"3-large"] % alignment == 0
    assert starts[b"3-large"] - starts[b"2-large"] == 33 * alignment
    assert starts[b"4-sparse"] == starts[b"3-large"] + 32 * alignment + BLOCK_SIZE
    content = (tmp_path / "image").read_bytes()
    assert content[starts[b"3-large"] :][: len(large)] == large
    assert not any(content[starts[b"2-large"] + len(large) : starts[b"3-large"]])


def test_inodes_follow_a_walk_of_the_tree(tmp_path: Path) -> None:
    """Children of one directory side by side and sorted, then the directories below, and never across a block."""
    items = [ROOT]
    for top in (b"m", b"a"):
        items.append(directory(top))
        for middle in (b"x", b"b-b", b"b"):
            items.append(directory(top + b"/" + middle))
            items += [file(top + b"/" + middle + b"/f%02d" % index, uid=70000) for index in range(40, 0, -1)]
    write_image(tmp_path / "image", items)
    with open_image(tmp_path / "image") as reader:
        assert reader.root == 1
        root = reader.inode(1)
        visits = [root] + [inode for _, inode in walk(reader, root) if stat.S_ISDIR(inode.mode)]
        nids = [1]
        for visited in visits:
            nids += [entry.nid for entry in reader.entries(visited) if entry.name not in (b".", b"..")]
        assert nids == sorted(nids)
        assert len(set(nids)) == len(items)
        for nid in nids:
            inode = reader.inode(nid)
            start = nid * 32 % BLOCK_SIZE
            length = inode.xattr_offset % BLOCK_SIZE or BLOCK_SIZE
            assert start < length
            if inode.layout == LAYOUT_INLINE:
                ((place, size),) = reader.extents(inode, 0, inode.size)
                assert place is not None
                assert place // BLOCK_SIZE == (place + size - 1) // BLOCK_SIZE


def test_a_time_equal_to_the_epoch_makes_small_inodes(tmp_path: Path) -> None:
    second = 10**9
    cases = {
        b"compact": {"mtime_ns": 77 * second, "uid": 65535, "gid": 65535},
        b"time": {"mtime_ns": 78 * second},
        b"fraction": {"mtime_ns": 77 * second + 1},
        b"before": {"mtime_ns": -1},
        b"uid": {"mtime_ns": 77 * second, "uid": 65536},
        b"gid": {"mtime_ns": 77 * second, "gid": 65536},
    }
    items = [ROOT] + [file(name, b"", **fields) for name, fields in cases.items()]
    write_image(tmp_path / "image", items, epoch=77)
    with open_image(tmp_path / "image") as reader:
        for name, fields in cases.items():
            inode = reader.resolve(name)
            assert inode.mtime_ns == fields["mtime_ns"]
            assert (inode.uid, inode.gid) == (fields.get("uid", 0), fields.get("gid", 0))
            size = inode.xattr_offset % BLOCK_SIZE - inode.nid * 32 % BLOCK_SIZE
            assert size == (32 if name == b"compact" else 64)


def test_more_links_than_16_bits_hold(tmp_path: Path) -> None:
    items = [ROOT, directory(b"d"), file(b"d/first")]
    items += [(Entry(b"d/l%05d" % index, 0, link_to=b"d/first"), b"") for index in range(65535)]
    write_image(tmp_path / "image", items)
    with open_image(tmp_path / "image") as reader:
        first = reader.resolve(b"d/first")
        assert first.nlink == 65536
        assert reader.resolve(b"d/l65534") == first


def test_sparse_file_keeps_its_holes(tmp_path: Path) -> None:
    size = (6 << 30) + 123
    extents = [(1 << 20, 10), ((5 << 30) + 5, 4096)]
    items: list[Item] = [ROOT, (Entry(b"sparse", FILE, size=size), b"a" * 10 + b"b" * 4096, extents)]
    summary = write_image(tmp_path / "image", items)
    assert summary.data_size == 4106
    assert summary.size < 1 << 20
    with open_image(tmp_path / "image") as reader:
        inode = reader.resolve(b"sparse")
        assert (inode.layout, inode.size) == (LAYOUT_CHUNKED, size)
        assert sum(length for _, length in reader.extents(inode, 0, size)) == size
        assert reader.read(inode, (1 << 20) - 1, 12) == b"\0" + b"a" * 10 + b"\0"
        assert reader.read(inode, (5 << 30) + 4, 4098) == b"\0" + b"b" * 4096 + b"\0"
        assert reader.read(inode, size - 3, 10) == bytes(3)
    fsck(tmp_path / "image")


def test_files_without_holes_and_small_holes_stay_plain(tmp_path: Path) -> None:
    items: list[Item] = [
        ROOT,
        (Entry(b"touching", FILE, size=9000), b"x" * 9000, [(0, 5000), (5000, 4000)]),
        (Entry(b"small-holes", FILE, size=9000), b"y" * 8000, [(0, 4000), (5000, 4000)]),
        (Entry(b"empty", FILE, size=0), b"", []),
    ]
    write_image(tmp_path / "image", items)
    with open_image(tmp_path / "image") as reader:
        for name, content in [(b"touching", b"x" * 9000), (b"small-holes", b"y" * 4000 + bytes(1000) + b"y" * 4000)]:
            inode = reader.resolve(name)
            assert inode.layout == LAYOUT_PLAIN
            assert reader.read(inode, 0, 9000) == content
        assert reader.resolve(b"empty").size == 0


def test_parents_may_follow_their_children(tmp_path: Path) -> None:
    items = [file(b"a/b/c/d", b"1"), directory(b"a/b/c"), directory(b"a"), ROOT, directory(b"a/b")]
    write_image(tmp_path / "image", items)
    with open_image(tmp_path / "image") as reader:
        assert sorted(scan_image(reader)) == [b"", b"a", b"a/b", b"a/b/c", b"a/b/c/d"]


def test_missing_parents_are_an_error_or_made_up(tmp_path: Path) -> None:
    items = [ROOT, file(b"a/b/c", b"1"), directory(b"a")]
    with pytest.raises(SourceError, match=r"^a/b: "):
        write_image(tmp_path / "image", items)
    with pytest.raises(SourceError, match=r"^/: "):
        write_image(tmp_path / "image", [file(b"a")])
    write_image(tmp_path / "image", items[1:2], synthesise_parents=True, epoch=9)
    with open_image(tmp_path / "image") as reader:
        for path in (b"", b"a", b"a/b"):
            inode = reader.resolve(path)
            assert (inode.mode, inode.uid, inode.gid, inode.mtime_ns) == (DIRECTORY, 0, 0, 9 * 10**9)
        assert reader.read(reader.resolve(b"a/b/c"), 0, 9) == b"1"


@pytest.mark.parametrize(
    "item",
    [
        file(b"/absolute"),
        file(b"//"),
        file(b"trailing/"),
        file(b"double//slash"),
        file(b"."),
        file(b".."),
        file(b"a/../b"),
        file(b"a/./b"),
        file(b"../up"),
        file(b"nul\0byte"),
        file(b"nul\0parent/x"),
        file(b"n" * 256),
        file(b"n" * 256 + b"/x"),
        file(b"/".join([b"d"] * (MAX_PATH // 2 + 1))),
        (Entry(b"x", 0), b""),
        (Entry(b"x", 0o644), b""),
        (Entry(b"x", 0o200644 | FILE), b""),
        (Entry(b"x", FILE, uid=-1), b""),
        (Entry(b"x", FILE, gid=1 << 32), b""),
        (Entry(b"x", FILE, size=-1), b""),
        (Entry(b"x", FILE, size=1 << 63), b""),
        (Entry(b"x", FILE, mtime_ns=10**9 << 63), b""),
        (Entry(b"x", FILE, size=5), b"four"),
        (Entry(b"x", FILE, size=5), b"xx", [(0, 3)]),
        (Entry(b"x", FILE, size=5), b"xxxx", [(3, 1), (0, 3)]),
        (Entry(b"x", FILE, size=5), b"xxxx", [(0, 3), (2, 1)]),
        (Entry(b"x", FILE, size=5), b"xxxx", [(0, 0)]),
        (Entry(b"x", FILE, size=5), b"xxxxxx", [(0, 6)]),
        (Entry(b"x", FILE, size=5), b"xxxxxx", [(-1, 3)]),
        (Entry(b"x", LINK), b""),
        (Entry(b"x", LINK, target=b"t" * 4096), b""),
        (Entry(b"x", LINK, target=b"t\0t"), b""),
        (Entry(b"x", stat.S_IFCHR, rdev=os.makedev(4096, 0)), b""),
        (Entry(b"x", stat.S_IFBLK, rdev=os.makedev(0, 1 << 20)), b""),
        (Entry(b"x", FILE, xattrs=((b"system.other", b""),)), b""),
        (Entry(b"", FILE), b""),
        (Entry(b"x", 0, link_to=b"missing"), b""),
        (Entry(b"x", 0, link_to=b"missing/too"), b""),
        (Entry(b"x", 0, link_to=b"d"), b""),
        (Entry(b"x", 0, link_to=b""), b""),
        (Entry(b"x", 0, link_to=b"x"), b""),
        (Entry(b"", 0, link_to=b"f"), b""),
        file(b"f"),
        directory(b"f"),
        directory(b"d"),
        directory(b"implied/d"),
        file(b"d"),
        file(b"implied"),
        file(b"f/below"),
        directory(b""),
        (Entry(b"f", 0, link_to=b"d/f"), b""),
        (Entry(b"f/x", 0, link_to=b"d/f"), b""),
    ],
)
def test_refused_entries_are_named_and_end_the_image(item: Item, tmp_path: Path) -> None:
    with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
        for other in (directory(b""), directory(b"d"), file(b"d/f"), file(b"f"), directory(b"implied/d")):
            writer.add(other[0])
        with pytest.raises(SourceError) as caught:
            writer.add(item[0], io.BytesIO(item[1]), item[2] if len(item) == 3 else None)
        message = str(caught.value)
        # The path, or the part of it that is at fault.
        assert printable(item[0].path).startswith(message.split(": ")[0].removesuffix("..."))
        assert "\n" not in message
        assert len(message) < 1000
        with pytest.raises(Exception, match="closed"):
            writer.finish()
    # No superblock was written: nothing can take the remains for an image.
    assert not any((tmp_path / "image").read_bytes()[:BLOCK_SIZE])


def test_missing_contents_are_refused(tmp_path: Path) -> None:
    with (
        FileSink(tmp_path / "image") as sink,
        ErofsWriter(sink, uuid=TEST_UUID) as writer,
        pytest.raises(SourceError, match="no contents"),
    ):
        writer.add(Entry(b"x", FILE, size=1))


@pytest.mark.parametrize(
    "options", [{"uuid": b"short"}, {"uuid": TEST_UUID, "epoch": -1}, {"uuid": TEST_UUID, "alignment": 512}]
)
def test_wrong_options_are_refused(options: dict[str, object], tmp_path: Path) -> None:
    with FileSink(tmp_path / "image") as sink, pytest.raises(ValueError, match=r"UUID|epoch|blocks"):
        ErofsWriter(sink, **options)  # type: ignore[arg-type]


def test_deep_paths_need_no_recursion(tmp_path: Path) -> None:
    depth = 3000
    items = [ROOT]
    path = b"d"
    for _ in range(depth):
        items.append(directory(path))
        path += b"/d"
    items.append(file(path, b"bottom"))
    write_image(tmp_path / "image", items)
    with open_image(tmp_path / "image") as reader:
        assert reader.read(reader.resolve(path), 0, 10) == b"bottom"
        assert sum(1 for _ in walk(reader, reader.inode(reader.root))) == depth + 1


def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
                writer.add(ROOT[0])
                for group in range(count // 100):
                    writer.add(Entry(b"d%d" % group, DIRECTORY))
                    for index in range(100):
                        writer.add(Entry(b"d%d/%d" % (group, index), FILE))
                writer.finish()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # The cache of directory numbers may fill up; SQLite's own cache is bounded by its setting.
    assert peak(20_000) < peak(2_000) + (1 << 20)


def test_memory_does_not_grow_with_the_square_of_the_depth(tmp_path: Path) -> None:
    """One name of a hostile archive implies thousands of directories, each with a path of its own."""
    depth = 8000
    with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
        tracemalloc.start()
        try:
            writer.add(Entry(b"/".join([b"a"] * depth), FILE))
            longest = max(map(len, writer.implied_directories()))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert longest == 2 * (depth - 1) - 1
    # All paths together are 64 MB.
    assert peak < 8 << 20


def test_directories_are_found_wherever_the_last_one_was(tmp_path: Path) -> None:
    """Also where directories were removed since, or something else has come into their place."""
    with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID, replace=True) as writer:
        for path in (b"a/b/c/f", b"a/b/d/f", b"a/b/f", b"x/y/f", b"a/b/c/g"):
            writer.add(Entry(path, FILE))
        writer.remove(b"a/b")
        writer.add(Entry(b"a/b/c/h", FILE))
        writer.add(Entry(b"x/y", FILE))
        with pytest.raises(SourceError, match=r"^x/y: something lies below it"):
            writer.add(Entry(b"x/y/z/f", FILE))
    with FileSink(tmp_path / "image") as sink, ErofsWriter(sink, uuid=TEST_UUID, synthesise_parents=True) as writer:
        for path in (b"a/b/c/f", b"a/b/d/f", b"a/f", b"x/y/f", b"a/b/c/g"):
            writer.add(Entry(path, FILE))
        writer.finish()
    with open_image(tmp_path / "image") as reader:
        found = sorted(path for path, _ in walk(reader, reader.inode(reader.root)))
    assert found == sorted(b"a a/b a/b/c a/b/c/f a/b/c/g a/b/d a/b/d/f a/f x x/y x/y/f".split())


def test_full_temporary_storage_is_reported(tmp_path: Path) -> None:
    """The database spills to a file; a limit on the size of files stands for a full disk."""
    script = """
import resource, signal, stat, sys
from encfs.erofs.writer import Entry, ErofsWriter
from encfs.errors import StorageError
class Sink:
    position = 0
    def write(self, data): self.position += len(data)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writer = ErofsWriter(Sink(), uuid=bytes(16))
try:
    for index in range(60000):
        writer.add(Entry(b"%d" % index, stat.S_IFREG, xattrs=((b"user.fill", bytes(1000)),)))
except StorageError as error:
    assert "TMPDIR" in error.hint and "\\n" not in str(error), error
    sys.exit(42)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "SQLITE_TMPDIR": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 42, result.stderr
    assert not os.listdir(tmp_path)
