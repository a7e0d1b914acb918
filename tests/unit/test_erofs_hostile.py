"""Images by someone hostile: changed metadata gives an error or another tree, never a crash, a hang or much work."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import LAYOUT_CHUNKED, LAYOUT_INLINE, MAX_PATH
from encfs.erofs.tree import Inode
from encfs.erofs.walk import walk
from encfs.erofs.writer import Entry
from encfs.errors import FormatError, NotFoundError, UnsupportedError
from tests.support.images import Item, write_image

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
REFUSED = (FormatError, UnsupportedError, NotFoundError)

ITEMS: list[Item] = [
    (Entry(b"", DIRECTORY, xattrs=((b"user.root", b"r"),)), b""),
    (Entry(b"d", DIRECTORY, mtime_ns=5), b""),
    (Entry(b"d/e", DIRECTORY), b""),
    (Entry(b"d/e/file", FILE, size=5000), b"c" * 5000),
    (Entry(b"d/f", FILE, size=1 << 20), b"start", [(8192, 5)]),
    (Entry(b"l", stat.S_IFLNK | 0o777, target=b"d/e/file", uid=70000), b""),
    (Entry(b"n", stat.S_IFCHR, rdev=os.makedev(1, 3)), b""),
]


#: A change can make a directory stand in its parent twice, not more.
MAX_NAMES = 4 * len(ITEMS)


class Image:
    """Bytes to be changed, and how much of them is read."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.bytes_read = 0

    def read(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= offset + size <= len(self.content)
        self.bytes_read += size
        return bytes(self.content[offset : offset + size])

    def open(self) -> ErofsReader:
        return ErofsReader(self.read, len(self.content))

    def inode(self, path: bytes) -> int:
        """Where the inode of a path lies."""
        (metadata,) = struct.unpack_from("<I", self.content, 1024 + 40)
        return int(metadata * 4096 + self.open().resolve(path, follow=False).nid * 32)


def make_image(tmp_path: Path, items: list[Item]) -> Image:
    write_image(tmp_path / "image", items)
    return Image((tmp_path / "image").read_bytes())


def refusal(action: Callable[[], object]) -> Exception | None:
    """How an action was refused; anything else than a refusal is a failure of the test."""
    try:
        action()
    except REFUSED as error:
        return error
    return None


def is_clean(error: Exception | None) -> bool:
    return error is None or "\n" not in str(error)


def use_everything(reader: ErofsReader) -> int:
    """Everything that a mount or an extraction does, contents only in part; the number of names met."""
    met = 0

    def attempt(action: Callable[[], object]) -> None:
        assert is_clean(refusal(action))

    def use(inode: Inode) -> None:
        attempt(lambda: reader.xattrs(inode))
        attempt(lambda: reader.read(inode, 0, 10_000))
        attempt(lambda: reader.read(inode, max(inode.size - 10, 0), 100))
        if stat.S_ISLNK(inode.mode):
            attempt(lambda: reader.readlink(inode))
        attempt(lambda: list(zip(range(100), reader.extents(inode, 0, inode.size), strict=False)))

    def use_tree() -> None:
        nonlocal met
        for _, inode in walk(reader, reader.inode(reader.root)):
            met += 1
            use(inode)

    use(reader.inode(reader.root))
    attempt(use_tree)
    for path in (b"d/e/file", b"l", b"d/e/../../n", b"l/x"):
        attempt(lambda path=path: reader.resolve(path))  # type: ignore[misc]
    return met


def check(image: Image) -> None:
    image.bytes_read = 0
    error = refusal(image.open)
    assert is_clean(error)
    if error is None:
        assert use_everything(image.open()) <= MAX_NAMES
        assert image.bytes_read < 2_000_000


def test_every_changed_byte(tmp_path: Path) -> None:
    image = make_image(tmp_path, ITEMS)
    metadata = struct.unpack_from("<I", image.content, 1024 + 40)[0] * 4096
    used = [place for place in range(metadata, len(image.content)) if image.content[place]]
    # What is zero matters too, next to what is not.
    places = sorted({place + step for place in used for step in range(-12, 13)} | set(range(1024, 1152)))
    for place in places:
        if not 1024 <= place < len(image.content):
            continue
        original = image.content[place]
        for value in {0, 1, original ^ 0x80, original ^ 0x02, 0xFF, ord("/")} - {original}:
            image.content[place] = value
            check(image)
        image.content[place] = original


def test_every_truncation(tmp_path: Path) -> None:
    image = make_image(tmp_path, ITEMS)
    content = bytes(image.content)
    for size in [*range(1200), *range(1200, len(content), 97)]:
        with pytest.raises(FormatError):
            Image(content[:size]).open()


@pytest.mark.parametrize(
    "value", [b"\xff" * 8, b"\0\0\0\0\1\0\0\0", b"\xff\xff\xff\x7f\xff\xff\xff\x7f", b"\1" + bytes(7)]
)
def test_every_changed_word(tmp_path: Path, value: bytes) -> None:
    image = make_image(tmp_path, ITEMS)
    metadata = struct.unpack_from("<I", image.content, 1024 + 40)[0] * 4096
    end = max(place for place in range(len(image.content)) if image.content[place])
    for place in [*range(1024, 1152, 2), *range(metadata, end, 2)]:
        for width in (2, 4, 8):
            original = image.content[place : place + width]
            image.content[place : place + width] = value[:width]
            check(image)
            image.content[place : place + width] = original


def entry_place(image: Image, directory: bytes, name: bytes) -> int:
    """Where the record of a name lies."""
    reader = image.open()
    inode = reader.resolve(directory)
    for entry in reader.entries(inode):
        if entry.name == name:
            position = (entry.next if entry.next % 4096 else 0) - 12
            if position < 0:
                position = 12 * (sum(1 for _ in reader.entries(inode)) - 1)
            ((place, _),) = reader.extents(inode, position, 12)
            assert place is not None
            return place
    raise AssertionError(name)


def set_nid(image: Image, directory: bytes, name: bytes, nid: int) -> None:
    struct.pack_into("<Q", image.content, entry_place(image, directory, name), nid)


@pytest.mark.parametrize("target", [b"", b"d", b"d/e"])
def test_loops_of_directories_end_a_walk(tmp_path: Path, target: bytes) -> None:
    image = make_image(tmp_path, ITEMS)
    set_nid(image, b"d/e", b"file", image.open().resolve(target).nid)
    reader = image.open()
    with pytest.raises(FormatError, match="elsewhere than its parent"):
        list(walk(reader, reader.inode(reader.root)))
    reader.resolve(b"d/e/file")  # one step is one step


def test_one_directory_under_many_names_ends_a_walk(tmp_path: Path) -> None:
    """Three levels of 200 names each that all lead to one directory would be eight million names."""
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    for level in range(3):
        below = b"".join(b"000/" for _ in range(level))
        items += [(Entry(below + b"%03d" % index, DIRECTORY), b"") for index in range(200)]
    image = make_image(tmp_path, items)
    for level in range(3):
        below = b"/".join(b"000" for _ in range(level))
        first = image.open().resolve(below + b"/000").nid
        for index in range(1, 200):
            set_nid(image, below, b"%03d" % index, first)
    reader = image.open()
    found = walk(reader, reader.inode(reader.root))
    with pytest.raises(FormatError, match="more names"):
        list(itertools.islice(found, len(image.content) // 13 + 1))


def test_paths_that_grow_without_end_are_cut(tmp_path: Path) -> None:
    """The last of a chain of directories, as deep as any may be, is made to hold one more level."""
    levels = MAX_PATH // 256
    path = b"/".join([b"n" * 255] * levels)
    items: list[Item] = [(Entry(path, DIRECTORY), b""), (Entry(b"spare", DIRECTORY), b"")]
    write_image(tmp_path / "image", items, synthesise_parents=True)
    image = Image((tmp_path / "image").read_bytes())
    reader = image.open()
    assert sum(1 for _ in walk(reader, reader.inode(reader.root))) == levels + 1
    # The deepest directory gets the entries of its parent, its own numbers, and the spare directory as its child.
    deepest, parent, spare = reader.resolve(path), reader.resolve(path[:-256]), reader.resolve(b"spare")
    ((source, size),) = reader.extents(parent, 0, parent.size)
    assert source is not None
    entries = bytearray(image.content[source : source + size])
    for index, nid in enumerate((deepest.nid, parent.nid, spare.nid)):
        struct.pack_into("<Q", entries, index * 12, nid)
    # Behind the image there is room for them.
    place = len(image.content)
    image.content += entries.ljust(4096, b"\0")
    inode = image.inode(path)
    struct.pack_into("<H", image.content, inode, 0)
    struct.pack_into("<I", image.content, inode + 8, size)
    struct.pack_into("<I", image.content, inode + 16, place // 4096)
    struct.pack_into("<Q", image.content, entry_place(image, b"spare", b".."), deepest.nid)
    reader = image.open()
    with pytest.raises(FormatError, match="longer paths"):
        list(walk(reader, reader.inode(reader.root)))


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        ([b"a", b"b", b"c"], True),
        ([b"b", b"a", b"c"], False),
        ([b"a", b"a", b"c"], False),
        ([b"a", b"/", b"c"], False),
        ([b"a", b"b", b"\0"], False),
        ([b"\0", b"b", b"c"], False),
    ],
)
def test_names_are_sorted_names(tmp_path: Path, names: list[bytes], allowed: bool) -> None:
    items: list[Item] = [(Entry(b"", DIRECTORY), b""), *[(Entry(name, FILE), b"") for name in (b"a", b"b", b"c")]]
    image = make_image(tmp_path, items)
    reader = image.open()
    root = reader.inode(reader.root)
    ((place, size),) = reader.extents(root, 0, root.size)
    assert place is not None
    image.content[place + size - 3 : place + size] = b"".join(names)
    reader = image.open()
    if allowed:
        assert len(list(reader.entries(root))) == 5
    else:
        with pytest.raises(FormatError):
            list(reader.entries(root))


def test_order_is_checked_across_blocks_and_on_resumption(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    items += [(Entry(b"%04d" % index + b"x" * 200, FILE), b"") for index in range(60)]
    image = make_image(tmp_path, items)
    reader = image.open()
    root = reader.inode(reader.root)
    entries = list(reader.entries(root))
    boundary = next(index for index, entry in enumerate(entries) if entry.next % 4096 == 0)
    ((place, _),) = reader.extents(root, 4096, 4096)
    assert place is not None
    (names,) = struct.unpack_from("<H", image.content, place + 8)
    image.content[place + names : place + names + 1] = b"!"  # now smaller than everything in the first block
    reader = image.open()
    for start in (0, entries[boundary - 1].next, entries[boundary].next):
        with pytest.raises(FormatError):
            list(reader.entries(root, start))


@pytest.mark.parametrize(
    ("layout", "size"),
    [(LAYOUT_INLINE, 1 << 62), (LAYOUT_CHUNKED, 1 << 62), (0, 1 << 62), (0, (1 << 64) - 1), (LAYOUT_CHUNKED, 1 << 40)],
)
def test_sizes_beyond_the_image(tmp_path: Path, layout: int, size: int) -> None:
    image = make_image(tmp_path, ITEMS)
    place = image.inode(b"l")  # extended
    for mode in (FILE, DIRECTORY, stat.S_IFLNK | 0o777):
        struct.pack_into("<HHHHQI", image.content, place, layout << 1 | 1, 0, mode, 0, size, 0)
        check(image)


def test_more_inodes_than_fit_are_refused(tmp_path: Path) -> None:
    image = make_image(tmp_path, ITEMS)
    struct.pack_into("<Q", image.content, 1024 + 16, 1 << 60)
    with pytest.raises(FormatError, match="inodes"):
        image.open()


def test_impossible_times_are_refused(tmp_path: Path) -> None:
    image = make_image(tmp_path, ITEMS)
    struct.pack_into("<Q", image.content, 1024 + 24, (1 << 64) - 1)
    with pytest.raises(FormatError, match="time"):
        image.open().resolve(b"n")
