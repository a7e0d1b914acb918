"""The reader on good images: lookups, listings and their cookies, paths, contents, how much it reads."""

from __future__ import annotations

import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import LAYOUT_INLINE, LAYOUT_PLAIN
from encfs.erofs.walk import walk
from encfs.erofs.writer import Entry
from encfs.errors import FormatError, IntegrityError, NotFoundError
from tests.support.images import Item, open_image, write_image

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
LINK = stat.S_IFLNK | 0o777


def link(path: bytes, target: bytes) -> Item:
    return Entry(path, LINK, target=target), b""


ITEMS: list[Item] = [
    (Entry(b"", DIRECTORY, xattrs=((b"user.root", b"r"),)), b""),
    (Entry(b"d", DIRECTORY), b""),
    (Entry(b"d/e", DIRECTORY), b""),
    (Entry(b"d/e/file", FILE, size=10_000), bytes(range(250)) * 40),
    (Entry(b"empty", FILE), b""),
    (Entry(b"-", FILE, size=1), b"-"),
    link(b"to-file", b"d/e/file"),
    link(b"to-directory", b"/d/./e/"),
    link(b"d/up", b"../../../d/e"),
    link(b"d/absolute", b"/to-directory/file"),
    link(b"dangling", b"nowhere"),
    link(b"loop", b"loop2"),
    link(b"loop2", b"d/../loop"),
    link(b"long", b"x/" * 2000 + b"y"),
    (Entry(b"null", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3), size=55), b""),
    (Entry(b"many", DIRECTORY), b""),
    *[(Entry(b"many/%04d" % index, FILE, uid=index), b"") for index in range(1500)],
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "image"
    write_image(path, ITEMS)
    return path


@pytest.fixture
def reader(image: Path) -> Iterator[ErofsReader]:
    with open_image(image) as opened:
        yield opened


def test_root_and_counts(reader: ErofsReader, image: Path) -> None:
    assert reader.root == 1
    assert reader.inode_count == len(ITEMS)
    assert reader.block_count * 4096 == image.stat().st_size
    root = reader.inode(reader.root)
    assert (root.nid, root.mode, root.nlink) == (1, DIRECTORY, 4)
    assert reader.xattrs(root) == {b"user.root": b"r"}


def test_lookup_finds_every_name_and_no_other(reader: ErofsReader) -> None:
    many = reader.resolve(b"many")
    assert many.layout == LAYOUT_PLAIN
    for index in range(1500):
        nid = reader.lookup(many, b"%04d" % index)
        assert nid is not None
        assert reader.inode(nid).uid == index
    for absent in (b"", b"!", b"0000a", b"000", b"0750x", b"1500", b"zzz", b"0\0", b"\xff" * 255, b"n" * 300):
        assert reader.lookup(many, absent) is None
    assert reader.lookup(many, b".") == many.nid
    assert reader.lookup(many, b"..") == reader.root
    assert reader.lookup(reader.inode(reader.root), b"..") == reader.root
    with pytest.raises(FormatError):
        reader.lookup(reader.resolve(b"empty"), b"x")


@pytest.mark.parametrize("path", [b"", b"many", b"d"])
def test_entries_resume_behind_any_entry(reader: ErofsReader, path: bytes) -> None:
    directory = reader.resolve(path)
    entries = list(reader.entries(directory))
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert {b".", b".."} <= set(names)
    assert len({entry.next for entry in entries} | {0}) == len(entries) + 1
    for position in range(0, len(entries), 37):
        assert list(reader.entries(directory, entries[position].next)) == entries[position + 1 :]
    assert list(reader.entries(directory, entries[-1].next)) == []
    assert list(reader.entries(directory, 1 << 62)) == []


def test_names_before_the_dots_come_first(reader: ErofsReader) -> None:
    names = [entry.name for entry in reader.entries(reader.inode(reader.root))]
    assert names[:3] == [b"-", b".", b".."]


def test_resolve_follows_links_within_the_image(reader: ErofsReader) -> None:
    file = reader.resolve(b"d/e/file")
    for path in (
        b"/d/e/file",
        b"d//e/./file",
        b"to-file",
        b"to-directory/file",
        b"d/up/file",
        b"d/absolute",
        b"../../d/e/file",
        b"d/e/../e/file",
        b"d/up/../e/file",
    ):
        assert reader.resolve(path) == file
    assert reader.resolve(b"") == reader.resolve(b"/") == reader.resolve(b"d/../..") == reader.inode(reader.root)
    assert reader.resolve(b"to-file", follow=False).size == len(b"d/e/file")
    assert stat.S_ISLNK(reader.resolve(b"dangling", follow=False).mode)
    assert stat.S_ISDIR(reader.resolve(b"to-directory/", follow=False).mode)


@pytest.mark.parametrize(
    "path",
    [b"x", b"d/x", b"empty/x", b"empty/", b"dangling", b"loop", b"loop/x", b"to-file/x", b"long", b"\0", b"n" * 999],
)
def test_resolve_says_what_is_not_there(reader: ErofsReader, path: bytes) -> None:
    with pytest.raises(NotFoundError) as caught:
        reader.resolve(path)
    assert "\n" not in str(caught.value)


def test_contents_by_any_range(reader: ErofsReader) -> None:
    content = bytes(range(250)) * 40
    file = reader.resolve(b"d/e/file")
    for offset in (0, 1, 4095, 4096, 9999, 10_000, 20_000):
        for size in (0, 1, 4096, 10_000, 1 << 40):
            assert reader.read(file, offset, size) == content[offset : offset + size]
            assert sum(length for _, length in reader.extents(file, offset, size)) == len(content[offset:][:size])
    assert reader.read(reader.resolve(b"empty"), 0, 10) == b""
    assert list(reader.extents(file, -1, 10)) == []


def test_special_files_have_no_contents(reader: ErofsReader) -> None:
    null = reader.resolve(b"null")
    assert (null.rdev, null.size) == (os.makedev(1, 3), 0)
    assert reader.read(null, 0, 10) == b""


def test_readlink(reader: ErofsReader) -> None:
    assert reader.readlink(reader.resolve(b"to-file", follow=False)) == b"d/e/file"
    assert reader.readlink(reader.resolve(b"long", follow=False)) == b"x/" * 2000 + b"y"
    with pytest.raises(FormatError):
        reader.readlink(reader.resolve(b"empty"))


def test_nothing_but_what_is_asked_for_is_read(image: Path) -> None:
    """Opening reads one window for the superblock and one for the root; a walk reads each window of metadata once."""
    reads: list[tuple[int, int]] = []
    content = image.read_bytes()

    def read(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return content[offset : offset + size]

    reader = ErofsReader(read, len(content))
    assert len(reads) <= 2
    assert sum(1 for _ in walk(reader, reader.inode(reader.root))) == len(ITEMS) - 1
    assert len(reads) == len(set(reads)) <= len(content) // 65536 + 1


def test_short_reads_and_errors_of_the_source_come_through(image: Path) -> None:
    content = image.read_bytes()
    with pytest.raises(FormatError):
        ErofsReader(lambda offset, size: content[offset : offset + size][:100], len(content))

    def broken(offset: int, size: int) -> bytes:
        raise IntegrityError("frame 3 is not what the root commits to")

    with pytest.raises(IntegrityError):
        ErofsReader(broken, len(content))


def test_source_may_return_views(image: Path) -> None:
    content = memoryview(image.read_bytes())
    reader = ErofsReader(lambda offset, size: content[offset : offset + size], len(content))
    assert reader.read(reader.resolve(b"-"), 0, 5) == b"-"


def test_threads_share_a_reader(reader: ErofsReader) -> None:
    many = reader.resolve(b"many")
    expected = [entry.nid for entry in reader.entries(many)]
    failures: list[object] = []

    def work() -> None:
        for _ in range(5):
            found = [entry.nid for entry in reader.entries(many)]
            if found != expected or [reader.inode(nid).nid for nid in found] != expected:
                failures.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_inline_tail_behind_whole_blocks(tmp_path: Path) -> None:
    """Our writer keeps tails of files in blocks of their own; other tools do not. Made by hand from a small file."""
    items: list[Item] = [(Entry(b"", DIRECTORY), b""), (Entry(b"f", FILE, uid=1 << 20, size=4096), b"b" * 4096)]
    summary = write_image(tmp_path / "image", items)
    content = bytearray((tmp_path / "image").read_bytes())
    view = memoryview(content)
    reader = ErofsReader(lambda offset, size: view[offset : offset + size], len(content))
    place = summary.metadata_offset + reader.resolve(b"f").nid * 32
    struct.pack_into("<H", content, place, LAYOUT_INLINE << 1 | 1)
    struct.pack_into("<Q", content, place + 8, 4096 + 10)
    content[place + 64 : place + 74] = b"0123456789"
    reader = ErofsReader(lambda offset, size: view[offset : offset + size], len(content))
    file = reader.resolve(b"f")
    assert reader.read(file, 4090, 100) == b"b" * 6 + b"0123456789"
    assert list(reader.extents(file, 4098, 3)) == [(place + 66, 3)]
