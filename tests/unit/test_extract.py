"""Extraction: everything or nothing, by whoever runs it, at any depth, and bounded for hostile images."""

from __future__ import annotations

import os
import stat
import subprocess
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from encfs.erofs.reader import ErofsReader
from encfs.erofs.structures import MAX_PATH
from encfs.erofs.writer import Entry
from encfs.errors import ConflictError, EncfsError, FormatError, IntegrityError, NotFoundError, StorageError
from encfs.extract import ExtractResult, extract_tree
from encfs.format.readahead import ReadAhead
from encfs.format.volume import VolumeReader
from encfs.format.writer import VolumeOptions, VolumeWriter
from encfs.progress import NoProgress
from tests.support.images import Item, write_image
from tests.support.memory import MemoryStore
from tests.support.nobody import NOBODY, as_nobody, nobodys_place
from tests.unit.test_volume import open_volume

FILE, DIRECTORY, LINK = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFLNK | 0o777
ROOT: Item = (Entry(b"", DIRECTORY), b"")


def make_volume(tmp_path: Path, items: list[Item]) -> tuple[VolumeReader, MemoryStore]:
    """A sealed volume with an image of these entries."""
    write_image(tmp_path / "image", [ROOT, *items], synthesise_parents=True)
    return seal(bytearray((tmp_path / "image").read_bytes()))


def seal(image: bytes | bytearray) -> tuple[VolumeReader, MemoryStore]:
    store = MemoryStore()
    writer = VolumeWriter(store, VolumeOptions(frame_size=4096))
    writer.write(image)
    written = writer.finish()
    for segment in written.descriptor.segments:
        store.blobs[segment.digest] = bytearray(store.blobs[segment.digest])
    return open_volume(store, written), store


def extract(volume: VolumeReader, target: Path) -> ExtractResult:
    ahead = ReadAhead(volume)
    try:
        return extract_tree(ErofsReader(volume.read, volume.size), ahead, target, NoProgress())
    finally:
        ahead.close()


@pytest.fixture
def place() -> Iterator[Path]:
    with nobodys_place() as directory:
        yield directory


def test_into_a_new_and_into_an_empty_directory(tmp_path: Path) -> None:
    volume, _ = make_volume(tmp_path, [(Entry(b"a/b", FILE, size=5), b"hello")])
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert extract(volume, tmp_path / name) == ExtractResult(2, 5, 0)
        assert (tmp_path / name / "a" / "b").read_bytes() == b"hello"
    assert sorted(os.listdir(tmp_path)) == ["empty", "image", "new"]


@pytest.mark.parametrize("kind", ["full", "file", "link", "dangling"])
def test_existing_targets_are_refused_and_kept(tmp_path: Path, kind: str) -> None:
    volume, _ = make_volume(tmp_path, [(Entry(b"a", FILE, size=1), b"x")])
    target = tmp_path / "target"
    if kind == "full":
        target.mkdir()
        (target / "mine").write_text("kept")
    elif kind == "file":
        target.write_text("kept")
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        target.symlink_to("elsewhere")
    else:
        target.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConflictError):
        extract(volume, target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_without_parent_is_refused(tmp_path: Path) -> None:
    volume, _ = make_volume(tmp_path, [])
    with pytest.raises(NotFoundError):
        extract(volume, tmp_path / "no" / "target")


def test_a_damaged_volume_leaves_nothing(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"d/%02d" % number, FILE, size=9000), bytes([number]) * 9000) for number in range(40)]
    volume, store = make_volume(tmp_path, items)
    segment = max(store.blobs.values(), key=len)
    assert isinstance(segment, bytearray)
    segment[len(segment) // 2] ^= 1
    with pytest.raises(IntegrityError):
        extract(volume, tmp_path / "target")
    assert os.listdir(tmp_path) == ["image"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"%02d" % number, FILE, size=9000), bytes([number]) * 9000) for number in range(40)]
    volume, _ = make_volume(tmp_path, items)

    class Interrupting(NoProgress):
        left = 20

        def advance(self, amount: int) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    ahead = ReadAhead(volume)
    with pytest.raises(KeyboardInterrupt):
        extract_tree(ErofsReader(volume.read, volume.size), ahead, tmp_path / "target", Interrupting())
    ahead.close()
    assert os.listdir(tmp_path) == ["image"]


def test_links_in_the_tree_are_never_followed(tmp_path: Path) -> None:
    """A hard link to a link is a link; what a link points to stays as it is."""
    (tmp_path / "victim").write_text("untouched")
    os.chmod(tmp_path / "victim", 0o600)
    target = os.fsencode(tmp_path / "victim")
    items: list[Item] = [
        (Entry(b"link", LINK, target=target, uid=1, gid=1, mtime_ns=5), b""),
        (Entry(b"again", 0, link_to=b"link"), b""),
        (Entry(b"up", LINK, target=b".."), b""),
    ]
    volume, _ = make_volume(tmp_path, items)
    before = os.stat(tmp_path / "victim")
    extract(volume, tmp_path / "target")
    after = os.stat(tmp_path / "victim")
    assert (before.st_mtime_ns, before.st_uid, before.st_mode) == (after.st_mtime_ns, after.st_uid, after.st_mode)
    assert os.readlink(tmp_path / "target" / "again") == str(tmp_path / "victim")
    assert os.lstat(tmp_path / "target" / "link").st_nlink == 2


def test_names_of_files_in_deep_directories_cost_no_memory(tmp_path: Path) -> None:
    """No system call takes the path of the first name: the second becomes a file of its own."""
    deep = b"/".join([b"d" * 250] * 400)
    items: list[Item] = [(Entry(b"%b/%d" % (deep, number), FILE, size=1), b"x") for number in range(300)]
    items += [(Entry(b"z/%d" % number, FILE, link_to=b"%b/%d" % (deep, number)), b"") for number in range(300)]
    items += [(Entry(b"z/again", FILE, link_to=b"%b/0" % deep), b"")]
    volume, _ = make_volume(tmp_path, items)
    tracemalloc.start()
    try:
        extract(volume, tmp_path / "target")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "target" / "z" / "299").read_bytes() == b"x"
    assert (tmp_path / "target" / "z" / "0").samefile(tmp_path / "target" / "z" / "again")
    subprocess.run(["rm", "-rf", tmp_path / "target"], check=True)


def test_listings_that_were_let_go_are_gone_on_with(tmp_path: Path) -> None:
    """Beside each of many levels lie files and directories that are listed before and after it."""
    items: list[Item] = []
    for depth in range(150):
        above = b"m/" * depth
        items += [(Entry(above + name, FILE, size=len(name)), name) for name in (b"a", b"z")]
        items += [(Entry(above + name, FILE, size=1), b"x") for name in (b"l/below", b"n/below")]
    items.sort(key=lambda item: item[0].path)
    volume, _ = make_volume(tmp_path, items)
    result = extract(volume, tmp_path / "target")
    assert result.names == 150 * 6 + 149
    found = {os.fsencode(path.relative_to(tmp_path / "target")) for path in (tmp_path / "target").rglob("*")}
    assert {entry.path for entry, _ in items} <= found
    assert len(found) == result.names


def test_a_deep_tree_needs_no_descriptors_and_goes_away_on_failure(tmp_path: Path) -> None:
    """Deeper than Python recurses and than descriptors are allowed."""
    depth = 1900
    path = b"/".join([b"d"] * depth)
    assert len(path) < MAX_PATH
    volume, store = make_volume(tmp_path, [(Entry(path + b"/f", FILE, size=4), b"deep")])
    extract(volume, tmp_path / "target")
    directory = os.open(tmp_path / "target", os.O_RDONLY)
    for _ in range(depth):
        below = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    file = os.open("f", os.O_RDONLY, dir_fd=directory)
    assert os.read(file, 10) == b"deep"
    os.close(file)
    os.close(directory)
    subprocess.run(["rm", "-rf", str(tmp_path / "target")], check=True)  # pytest recurses

    segment = max(store.blobs.values(), key=len)
    assert isinstance(segment, bytearray)
    segment[0] ^= 1  # frame 1, which holds the file
    with pytest.raises(IntegrityError):
        extract(volume, tmp_path / "target")
    assert os.listdir(tmp_path) == ["image"]


@pytest.mark.root
def test_an_ordinary_user_gets_everything_of_his_own(tmp_path: Path, place: Path) -> None:
    own = partial(Entry, uid=NOBODY, gid=NOBODY)
    items: list[Item] = [
        (own(b"file", stat.S_IFREG | 0o4755, size=1, xattrs=((b"user.a", b"1"),)), b"x"),
        (own(b"closed", stat.S_IFDIR), b""),
        (own(b"closed/within", FILE, size=1), b"y"),
        (own(b"readonly", stat.S_IFDIR | 0o555), b""),
        (own(b"readonly/within", FILE, size=1), b"z"),
        (own(b"fifo", stat.S_IFIFO | 0o600), b""),
    ]
    volume, _ = make_volume(tmp_path, items)
    with as_nobody():
        result = extract(volume, place / "target")
        assert os.getxattr(place / "target" / "file", "user.a") == b"1"
    assert result.skipped == 1  # the root directory's owner
    assert (place / "target" / "closed" / "within").read_bytes() == b"y"
    assert stat.S_IMODE((place / "target" / "closed").stat().st_mode) == 0
    assert stat.S_IMODE((place / "target" / "file").stat().st_mode) == 0o4755


@pytest.mark.root
def test_an_ordinary_user_does_not_inherit_the_rights_of_others(tmp_path: Path, place: Path) -> None:
    """A setuid file of root's does not become one of the user who extracts it."""
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    items: list[Item] = [
        (Entry(b"setuid", stat.S_IFREG | 0o6755, size=1, xattrs=((b"user.a", b"1"),)), b"x"),
        (Entry(b"capable", stat.S_IFREG | 0o755, size=1, xattrs=((b"security.capability", capability),)), b"x"),
        (Entry(b"device", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)), b""),
        (Entry(b"device-again", 0, link_to=b"device"), b""),
    ]
    volume, _ = make_volume(tmp_path, items)
    with as_nobody():
        result = extract(volume, place / "target")
        assert os.getxattr(place / "target" / "setuid", "user.a") == b"1"
    assert sorted(os.listdir(place / "target")) == ["capable", "setuid"]
    assert stat.S_IMODE((place / "target" / "setuid").stat().st_mode) == 0o755
    assert os.listxattr(place / "target" / "capable") == []
    # Owners of the root directory and both files, the capability, both names of the device.
    assert result.skipped == 6


def test_an_owner_that_means_none_to_chown_does_not_give_rights_to_who_extracts(tmp_path: Path) -> None:
    """chown(2) takes 2^32-1 for "as it is": the setuid file would be one of the user who extracts."""
    nobody, mine = (1 << 32) - 1, os.getuid()
    items: list[Item] = [
        (Entry(b"uid", stat.S_IFREG | 0o6755, uid=nobody, gid=os.getgid(), size=1), b"x"),
        (Entry(b"gid", stat.S_IFREG | 0o6755, uid=mine, gid=nobody, size=1), b"x"),
        (Entry(b"link", LINK, uid=nobody, gid=nobody, target=b"uid"), b""),
    ]
    volume, _ = make_volume(tmp_path, items)
    result = extract(volume, tmp_path / "target")
    for name in ("uid", "gid"):
        assert stat.S_IMODE((tmp_path / "target" / name).stat().st_mode) == 0o755
    assert result.skipped == 3 + (mine != 0)  # the root directory's owner


@pytest.mark.root
def test_an_ordinary_user_leaves_nothing_behind_on_failure(tmp_path: Path, place: Path) -> None:
    """Even where he has already made directories that he may not write to."""
    items: list[Item] = [
        (Entry(b"a", stat.S_IFDIR | 0o555, uid=NOBODY, gid=NOBODY), b""),
        (Entry(b"a/b", stat.S_IFDIR, uid=NOBODY, gid=NOBODY), b""),
        (Entry(b"a/b/file", FILE, size=1), b"y"),
        (Entry(b"z", FILE, size=9000), b"z" * 9000),
    ]
    volume, store = make_volume(tmp_path, items)
    segment = max(store.blobs.values(), key=len)
    assert isinstance(segment, bytearray)
    segment[2 * 4112] ^= 1
    with as_nobody(), pytest.raises(IntegrityError):
        extract(volume, place / "target")
    assert os.listdir(place) == []


@pytest.mark.root
def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path, place: Path) -> None:
    volume, _ = make_volume(tmp_path, [])
    with as_nobody(), pytest.raises(StorageError):
        extract(volume, place.parent / "target")


@pytest.mark.parametrize("name", [b"/x", b"..", b"a/"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: bytes) -> None:
    """An image whose author put a path where a name belongs."""
    write_image(tmp_path / "image", [ROOT, (Entry(b"QQ", FILE, size=1), b"x")])
    image = (tmp_path / "image").read_bytes()
    assert image.count(b"QQ") == 1
    volume, _ = seal(image.replace(b"QQ", name))
    with pytest.raises(FormatError):
        extract(volume, tmp_path / "target")
    assert os.listdir(tmp_path) == ["image"]


def test_directories_that_contain_each_other_are_refused(tmp_path: Path) -> None:
    """Every nid of a directory entry is changed to every other directory's: no outcome may be endless."""
    items: list[Item] = [(Entry(path, DIRECTORY), b"") for path in (b"aa", b"aa/bb", b"aa/bb/cc")]
    write_image(tmp_path / "image", [ROOT, *items])
    image = (tmp_path / "image").read_bytes()
    with open(tmp_path / "image", "rb") as file:
        reader = ErofsReader(lambda offset, size: os.pread(file.fileno(), size, offset), len(image))
        nids = [reader.root, *(reader.resolve(path).nid for path in (b"aa", b"aa/bb", b"aa/bb/cc"))]
    refused = 0
    for start in range(4096, len(image) - 8, 4):
        nid = int.from_bytes(image[start : start + 8], "little")
        if nid not in nids:
            continue
        for other in nids:
            changed = image[:start] + other.to_bytes(8, "little") + image[start + 8 :]
            volume, _ = seal(changed)
            target = tmp_path / f"target-{start}-{other}"
            try:
                extract(volume, target)
            except EncfsError:
                refused += 1
                assert not target.exists()
    assert refused > 5
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
