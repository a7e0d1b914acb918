"""Real and random trees through encryption and back: by extraction, by our reader, and by the kernel's EROFS.

The judge is the source tree itself, as `lstat`, `listxattr` and its contents show it (tests/support/trees.py).
"""

from __future__ import annotations

import os
import shutil
import stat
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encfs.artifact import open_artifact
from encfs.erofs.reader import ErofsReader
from encfs.erofs.writer import Entry
from encfs.extract import extract_tree
from encfs.format.readahead import ReadAhead
from encfs.format.suite import SUITES
from encfs.format.writer import VolumeOptions
from encfs.keys.files import write_key_files
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.keys.providers import provider_from_uri
from encfs.oci.layout import Layout
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from imagetool.pipeline.check import verify
from imagetool.pipeline.encrypt import EncryptOptions, encrypt
from tests.support.images import Item, kernel_mount
from tests.support.random_trees import trees
from tests.support.trees import Node, assert_same, make_odd_tree, scan_image, scan_tree

#: Files of a real Python installation that are taken, and their bytes: the whole of one takes a minute.
MAX_FILES = 4000
MAX_SIZE = 60 << 20


def source_nodes(source: Path) -> dict[bytes, Node]:
    """The source; a hard link from outside of it counts for nothing, since no copy has it."""
    nodes = scan_tree(source)
    for node in nodes.values():
        if not stat.S_ISDIR(node.mode) and len(node.group) < 2:
            node.nlink, node.group = 1, ()
    return nodes


def round_trip(source: Path, work: Path, options: VolumeOptions) -> None:
    """Encrypt, verify, extract, and mount the decrypted image with the kernel: all the same as `source`."""
    key = generate_key("x25519")
    assert isinstance(key, PrivateKey)
    write_key_files(key, work / "key.jwk")
    layout = Layout(work / "layout", create=True)
    result = encrypt(
        source,
        layout,
        [key.public],
        options=EncryptOptions("acme/tree", 1, options),
        tag="v1",
        progress=NoProgress(),
    )
    keys, trust = [provider_from_uri(str(work / "key.jwk"))], TrustPolicy(pin=result.content.digest)
    verify(layout, keys=keys, trust=trust, progress=NoProgress())
    expected = source_nodes(source)
    assert result.files == len({node.group or path for path, node in expected.items()})
    with open_artifact(layout, keys=keys, trust=trust) as artifact:
        [volume] = artifact.volumes
        reader, ahead = ErofsReader(volume.read, volume.size), ReadAhead(volume)
        extracted = extract_tree(reader, ahead, work / "extracted", NoProgress())
        ahead.close()
        assert extracted.names == len(expected) - 1
        assert extracted.skipped == 0
        assert_same(expected, scan_tree(work / "extracted"))
        assert_same(expected, scan_image(reader))
        write_image(volume.read, volume.size, work / "image")
    with kernel_mount(work / "image", work / "mounted") as mounted:
        assert_same(expected, scan_tree(mounted))
    layout.close()
    assert sorted(path.name for path in work.iterdir() if path != source) == [
        "extracted",
        "image",
        "key.jwk",
        "key.jwk.pub",
        "layout",
        "mounted",
    ]


def write_image(read: Callable[[int, int], memoryview], size: int, path: Path) -> None:
    with open(path, "wb") as file:
        for offset in range(0, size, 1 << 20):
            file.write(read(offset, 1 << 20))


@pytest.mark.root
@pytest.mark.parametrize("suite", sorted(SUITES))
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zstd"])
def test_every_odd_kind_of_file_comes_back(tmp_path: Path, suite: str, compress: bool) -> None:
    make_odd_tree(tmp_path / "odd")
    try:
        round_trip(tmp_path / "odd", tmp_path, VolumeOptions(suite=SUITES[suite], compress=compress))
    finally:
        for name in ("odd", "extracted"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.mark.root
def test_a_part_of_a_python_installation_comes_back(tmp_path: Path) -> None:
    copy_part(Path(sysconfig.get_path("purelib")), tmp_path / "python")
    round_trip(tmp_path / "python", tmp_path, VolumeOptions())


def copy_part(source: Path, target: Path) -> None:
    """The first files of an installation in order of their paths, as they are, with all of their directories."""
    files = size = 0
    for directory, directories, names in os.walk(source):
        directories.sort()
        place = target / os.path.relpath(directory, source)
        place.mkdir(parents=True, exist_ok=True)
        for name in sorted(names):
            file = Path(directory, name)
            shutil.copy2(file, place / name, follow_symlinks=False)
            files += 1
            size += file.lstat().st_size
            if files >= MAX_FILES or size >= MAX_SIZE:
                return
        shutil.copystat(directory, place)
    assert files > 100  # otherwise the installation is not one


# -- random trees


def materialise(items: Sequence[Item], root: Path) -> None:
    """Random entries as real files, as far as the filesystem takes them: what it keeps is what is compared with."""
    base = os.fsencode(root)
    ordered = sorted(items, key=lambda item: (item[0].link_to is not None, item[0].path))
    for entry, content, *extents in ordered:
        full = base + b"/" + entry.path if entry.path else base
        kind = stat.S_IFMT(entry.mode)
        if entry.link_to is not None:
            os.link(base + b"/" + entry.link_to, full, follow_symlinks=False)
        elif kind == stat.S_IFDIR:
            os.mkdir(full)
        elif kind == stat.S_IFREG:
            _write_file(full, entry.size, content, extents[0] if extents else [(0, len(content))])
        elif kind == stat.S_IFLNK:
            os.symlink(entry.target, full)
        else:
            os.mknod(full, kind | 0o600, entry.rdev)
    for entry, *_ in reversed(ordered):
        if entry.link_to is None:
            _set_attributes(base + b"/" + entry.path if entry.path else base, entry)


def _write_file(full: bytes, size: int, content: bytes, extents: Sequence[tuple[int, int]]) -> None:
    with open(full, "wb") as file:
        position = 0
        for offset, length in extents:
            os.pwrite(file.fileno(), content[position : position + length], offset)
            position += length
        os.truncate(file.fileno(), size)


def _set_attributes(full: bytes, entry: Entry) -> None:
    os.chown(full, entry.uid, entry.gid, follow_symlinks=False)
    for name, value in entry.xattrs:
        with suppress(OSError):  # more than the filesystem has room for
            os.setxattr(full, name, value, follow_symlinks=False)
    if not stat.S_ISLNK(entry.mode):
        os.chmod(full, stat.S_IMODE(entry.mode))
    with suppress(OverflowError, OSError):  # before or after what the filesystem can say
        os.utime(full, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


@pytest.mark.root
@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(
    items=trees(),
    suite=st.sampled_from(sorted(SUITES)),
    frame_size=st.sampled_from([4096, 16384, 65536, 1 << 20]),
    compress=st.booleans(),
)
def test_random_trees_come_back(items: list[Item], suite: str, frame_size: int, compress: bool, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
        work = Path(directory)
        materialise(items, work / "source")
        round_trip(work / "source", work, VolumeOptions(SUITES[suite], frame_size, compress=compress))
