"""Images before the judges: the kernel's EROFS, from a file and from a daemon, and the official tools."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encfs.erofs.writer import Entry, ErofsWriter
from encfs.mount import mounts
from encfs.mount.mountpoint import top_mount
from imagetool.sources.directory import SourceOptions, add_source
from tests.support.images import TEST_UUID, FileSink, Item, fsck, kernel_mount, open_image, write_image
from tests.support.mounts import detach_all, end_mount, mounted, runtime_directory, start_mount, wait_for_end
from tests.support.random_trees import expected_nodes, trees
from tests.support.trees import Scope, assert_same, make_odd_tree, scan_image, scan_tree
from tests.support.waiting import alone, wait_until

pytestmark = pytest.mark.root

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644


@pytest.fixture(scope="module")
def odd_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "tree"
    make_odd_tree(path, depth=500)
    return path


@pytest.mark.parametrize("epoch", [0, 1_700_000_000])
def test_odd_tree_is_the_same_to_kernel_reader_and_fsck(odd_tree: Path, tmp_path: Path, epoch: int) -> None:
    image = tmp_path / "image"
    with FileSink(image) as sink, ErofsWriter(sink, uuid=TEST_UUID, epoch=epoch) as writer:
        add_source(odd_tree, writer, SourceOptions(), lambda size: None)
        writer.finish()
    source = scan_tree(odd_tree)
    assert len(source) > 1000
    with kernel_mount(image, tmp_path / "mount") as mount:
        seen = scan_tree(mount)
    assert_same(source, seen)
    with open_image(image) as reader:
        assert_same(seen, scan_image(reader), Scope(directory_links=True))
    fsck(image)


@given(trees(max_nodes=60), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_random_trees_are_the_same_to_the_kernel(items: list[Item], epoch: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        image = Path(directory, "image")
        write_image(image, items, epoch=epoch)
        with kernel_mount(image, Path(directory, "mount")) as mount:
            assert_same(expected_nodes(items), scan_tree(mount), Scope(directory_links=True))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-Enoinline_data"],
        ["-Eforce-inode-extended"],
        ["--chunksize=4096"],
        ["--chunksize=65536"],
        ["-Eforce-chunk-indexes", "--chunksize=8192"],
        ["-x1"],
        ["-T1000"],
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_images_of_mkfs_are_read_as_the_kernel_reads_them(tmp_path: Path, options: list[str]) -> None:
    tree = tmp_path / "tree"
    make_odd_tree(tree)
    # mkfs.erofs 1.5 takes no names of 255 bytes, and stores holes.
    (tree / ("n" * 255)).unlink()
    (tree / "huge-hole").unlink()
    image = tmp_path / "image"
    subprocess.run(["mkfs.erofs", "--quiet", *options, str(image), str(tree)], check=True, capture_output=True)
    with kernel_mount(image, tmp_path / "mount") as mount, open_image(image) as reader:
        assert_same(scan_tree(mount), scan_image(reader), Scope(directory_links=True))


def test_tree_deeper_than_any_path(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    path = b"level"
    for level in range(1500):
        items += [
            (Entry(path, DIRECTORY, uid=level), b""),
            (Entry(path + b"/f", FILE, size=2), b"%02d" % (level % 100)),
        ]
        path += b"/level"
    image = tmp_path / "image"
    write_image(image, items)
    with kernel_mount(image, tmp_path / "mount") as mount, open_image(image) as reader:
        seen = scan_tree(mount)
        assert_same(expected_nodes(items), seen, Scope(directory_links=True))
        assert_same(seen, scan_image(reader), Scope(directory_links=True))


def test_directory_of_100_000_entries(tmp_path: Path) -> None:
    count = 100_000
    items: list[Item] = [(Entry(b"", DIRECTORY), b""), (Entry(b"large", DIRECTORY), b"")]
    items += [(Entry(b"large/%d" % index, FILE, uid=index), b"") for index in range(count)]
    image = tmp_path / "image"
    write_image(image, items)
    with open_image(image) as reader, kernel_mount(image, tmp_path / "mount") as mount:
        large = reader.resolve(b"large")
        ours = {entry.name: entry.nid for entry in reader.entries(large)}
        assert set(os.listdir(os.fsencode(mount) + b"/large")) == ours.keys() - {b".", b".."}
        assert len(ours) == count + 2
        for index in range(0, count, 97):
            name = b"%d" % index
            assert os.stat(os.fsencode(mount) + b"/large/" + name).st_uid == index
            nid = reader.lookup(large, name)
            assert nid == ours[name]
            assert reader.inode(nid).uid == index
        assert not (mount / "large" / "100000").exists()
    fsck(image)


_ZEROS = bytes(1 << 20)


class _Marks:
    """Contents of zeros but for a mark every GiB. Relies on a buffer that is zeros at first and always the same."""

    def __init__(self) -> None:
        self._position = 0
        self._mark: memoryview | None = None

    def readinto(self, buffer: memoryview, /) -> int:
        if self._mark is not None:
            self._mark[:] = bytes(8)
            self._mark = None
        place = -self._position % (1 << 30)
        if place + 8 <= len(buffer):
            self._mark = buffer[place : place + 8]
            self._mark[:] = (self._position + place).to_bytes(8, "little")
        self._position += len(buffer)
        return len(buffer)


class _SparseSink(FileSink):
    """Leaves holes in the image file where zeros are written."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if len(data) == len(_ZEROS) and bytes(data) == _ZEROS:
            self.skip(len(data))
        else:
            super().write(data)


def test_dense_file_beyond_4_gib(tmp_path: Path) -> None:
    size = (5 << 30) + 8
    image = tmp_path / "image"
    with _SparseSink(image) as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
        writer.add(Entry(b"", DIRECTORY))
        writer.add(Entry(b"dense", FILE, size=size), _Marks())
        writer.add(Entry(b"behind", FILE, size=5), _Text(b"after"))
        summary = writer.finish()
    assert summary.data_size == size + 5
    assert summary.size > size
    with kernel_mount(image, tmp_path / "mount") as mount, open_image(image) as reader:
        inode = reader.resolve(b"dense")
        assert list(reader.extents(inode, 0, size)) == [(4096, size)]
        with open(mount / "dense", "rb") as file:
            assert os.fstat(file.fileno()).st_size == size
            for offset in range(0, size, 1 << 30):
                expected = offset.to_bytes(8, "little")
                assert os.pread(file.fileno(), 8, offset) == expected
                assert reader.read(inode, offset, 8) == expected
        assert (mount / "behind").read_bytes() == b"after"


class _Text:
    def __init__(self, text: bytes) -> None:
        self._text = text

    def readinto(self, buffer: memoryview, /) -> int:
        buffer[:] = self._text
        return len(self._text)


def test_sparse_files_of_all_sizes(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    for bits in (13, 20, 30, 33, 40, 50, 62):
        size = (1 << bits) + 12345
        extents = [(size // 2, 7), (size - 3, 3)] if bits < 45 else []
        items.append((Entry(b"sparse-%d" % bits, FILE, size=size), b"middle!end" if extents else b"", extents))
    image = tmp_path / "image"
    summary = write_image(image, items)
    assert summary.size < 64 << 20
    with kernel_mount(image, tmp_path / "mount") as mount, open_image(image) as reader:
        for entry, content, sparse in (item for item in items if len(item) == 3):
            extents = list(sparse)
            inode = reader.resolve(entry.path)
            with open(os.fsencode(mount) + b"/" + entry.path, "rb") as file:
                assert os.fstat(file.fileno()).st_size == inode.size == entry.size
                for offset in (0, entry.size // 2 - 3, entry.size - 20):
                    assert os.pread(file.fileno(), 20, offset) == reader.read(inode, offset, 20)
                if extents:
                    assert reader.read(inode, entry.size // 2, 7) == b"middle!"
                    assert reader.read(inode, entry.size - 3, 10) == b"end"
                assert len(content) == sum(length for _, length in extents)


def test_kernel_knows_the_uuid_and_the_counts(tmp_path: Path) -> None:
    items: list[Item] = [(Entry(b"", DIRECTORY), b""), (Entry(b"f", FILE, size=3), b"abc")]
    summary = write_image(tmp_path / "image", items)
    with kernel_mount(tmp_path / "image", tmp_path / "mount") as mount:
        stats = os.statvfs(mount)
        assert stats.f_bsize == 4096
        assert stats.f_blocks == summary.size // 4096
        assert os.stat(mount).st_ino == 1
    printed = subprocess.run(["dump.erofs", "-s", str(tmp_path / "image")], capture_output=True, text=True, check=True)
    assert "00010203-0405-0607-0809-0a0b0c0d0e0f" in printed.stdout


@pytest.fixture(scope="module")
def odd_image(odd_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tmp_path_factory.mktemp("kernel") / "image"
    with FileSink(image) as sink, ErofsWriter(sink, uuid=TEST_UUID) as writer:
        add_source(odd_tree, writer, SourceOptions(), lambda size: None)
        writer.finish()
    return image


@pytest.mark.fuse
@pytest.mark.parametrize("options", [[], ["--loop"], ["--cold"]], ids=["file", "loop", "cold"])
def test_the_kernel_reads_what_a_daemon_serves(
    odd_tree: Path, odd_image: Path, tmp_path: Path, options: list[str]
) -> None:
    words = ("--backend", "erofs", "--dev", *options)
    with alone("loop"), mounted(odd_image, tmp_path / "mount", tmp_path / "run", *words) as status:
        assert status.backend == "erofs"
        assert status.read_ahead == 1 << 20
        mount = top_mount(str(tmp_path / "mount"))
        assert mount is not None
        assert mount.filesystem_type == ("overlay" if options == ["--loop"] else "erofs")
        expected = scan_tree(odd_tree)
        if options == ["--loop"]:
            # overlayfs takes it for a whiteout.
            expected = {path: node for path, node in expected.items() if node.rdev or not stat.S_ISCHR(node.mode)}
        assert_same(expected, scan_tree(tmp_path / "mount"))
        used = _loop_devices()
        assert bool(used) is (options == ["--loop"])
        end_mount(tmp_path / "run", tmp_path / "mount")
        wait_until(lambda: not used & _loop_devices())


@pytest.mark.fuse
@pytest.mark.parametrize("options", [[], ["--loop"]], ids=["file", "loop"])
def test_a_killed_daemon_leaves_no_loop_device(odd_image: Path, tmp_path: Path, options: list[str]) -> None:
    with alone("loop"):
        _kill_and_look(odd_image, tmp_path, options)


def _kill_and_look(odd_image: Path, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "mount").mkdir()
    status = start_mount(odd_image, tmp_path / "mount", tmp_path / "run", "--backend", "erofs", *options)
    try:
        used = _loop_devices()
        os.kill(status.pid, signal.SIGKILL)
        assert wait_for_end(status.pid)
        with runtime_directory(tmp_path / "run"):
            assert [one.state for one in mounts() if one.mountpoint == str(tmp_path / "mount")] == ["dead"]
        end_mount(tmp_path / "run", tmp_path / "mount")
        wait_until(lambda: not used & _loop_devices())
        assert list((tmp_path / "run").iterdir()) == []
    finally:
        detach_all(tmp_path / "mount")


@pytest.mark.fuse
def test_what_does_not_verify_is_an_input_error_of_the_kernel(tmp_path: Path) -> None:
    """Contents, and a directory: the kernel gets neither zeros nor other bytes."""
    items: list[Item] = [(Entry(b"", DIRECTORY), b""), (Entry(b"good", FILE, size=4), b"good")]
    items.append((Entry(b"large", FILE, size=1 << 20), b"x" * (1 << 20)))
    items += [(Entry(b"d", DIRECTORY), b"")]
    items += [(Entry(b"d/%04d" % index, FILE, size=0), b"") for index in range(3000)]
    image = tmp_path / "image"
    write_image(image, items)
    with open_image(image) as reader:
        ((large, length),) = reader.extents(reader.resolve(b"large"), 0, 1 << 20)
        ((names, size),) = reader.extents(reader.resolve(b"d"), 0, 1 << 20)
    broken = [f"--broken={large + length // 2}-{large + length}", f"--broken={names}-{names + size}"]
    with mounted(image, tmp_path / "mount", tmp_path / "run", "--backend", "erofs", *broken):
        assert (tmp_path / "mount" / "good").read_bytes() == b"good"
        with open(tmp_path / "mount" / "large", "rb") as file, pytest.raises(OSError, match="Input/output error"):
            os.pread(file.fileno(), 4096, length - 4096)
        with pytest.raises(OSError, match="Input/output error"):
            os.listdir(tmp_path / "mount" / "d")
        assert (tmp_path / "mount" / "good").read_bytes() == b"good"
        end_mount(tmp_path / "run", tmp_path / "mount")


def _loop_devices() -> set[str]:
    """Those over an image of a daemon of ours, of whichever process: whoever counts them is to be alone."""
    listed = subprocess.run(["losetup", "-l", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in listed.stdout.splitlines() if "encfs-0" in line}
