"""What a mount shows: the tree exactly as it was, every attribute, and read-only in every respect. All real FUSE."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from encfs.erofs.writer import Entry
from encfs.mount.mountpoint import top_mount
from encfs.oci.layout import Layout
from tests.support.artifacts import encrypt_tree, make_keys
from tests.support.images import Item, write_image
from tests.support.mounts import known_mounts, make_image, mounted
from tests.support.trees import FILE_CAPABILITY, POSIX_ACL, assert_same, make_odd_tree, scan_tree

pytestmark = [pytest.mark.fuse, pytest.mark.root]

#: POSIX_ACL without the permissions for everybody: owner, user 1000, group, mask, others.
ACL_FOR_1000 = POSIX_ACL[:4] + b"".join(
    POSIX_ACL[start : start + 2]
    + (b"\0\0" if POSIX_ACL[start] in (0x04, 0x20) else b"\6\0")
    + POSIX_ACL[start + 4 :][:4]
    for start in range(4, len(POSIX_ACL), 8)
)
DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """(source, mount) of a tree with every kind of file, encrypted and mounted."""
    base = tmp_path_factory.mktemp("odd")
    make_odd_tree(base / "source")
    # Reading gigabytes of zeros through FUSE takes long: `test_beyond_four_gigabytes` looks at the places that matter.
    (base / "source" / "huge-hole").unlink()
    keys = make_keys(base)
    encrypt_tree(base / "source", Layout(str(base / "layout"), create=True), keys)
    with mounted(base / "layout", base / "mount", base / "run", "--key", str(keys.recipient_file), "--dev", "--suid"):
        yield base / "source", base / "mount"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount of a small image, made by erofs-utils: its root is not inode 1, and tails are inlined."""
    base = tmp_path_factory.mktemp("plain")
    source = base / "source"
    (source / "sub" / "inner").mkdir(parents=True)
    (source / "file").write_bytes(b"contents")
    os.link(source / "file", source / "sub" / "second-name")
    (source / "link").symlink_to("sub/inner")
    for name, key, value in [
        ("file", "user.one", b"1"),
        ("file", "trusted.hidden", b"2"),
        ("sub", "user.long", b"x" * 3000),
        ("sub/inner", "system.posix_acl_access", POSIX_ACL),
    ]:
        os.setxattr(source / name, key, value)
    with mounted(make_image(source, base / "image"), base / "mount", base / "run"):
        yield base / "mount"


def failure(call: Callable[[], object]) -> str:
    """The name of the errno with which a call fails."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what is asked for
        call()
    assert caught.value.errno is not None
    return errno.errorcode[caught.value.errno]


# The tree


def test_tree_is_identical(odd: tuple[Path, Path]) -> None:
    source, mount = odd
    assert_same(scan_tree(source), scan_tree(mount))


def test_tree_is_identical_on_a_second_look(odd: tuple[Path, Path]) -> None:
    """From the kernel's caches this time, and from the other end."""
    source, mount = odd
    scan_tree(mount)
    assert_same(scan_tree(mount), scan_tree(source))


def make_foreign_image(base: Path) -> tuple[Path, Path]:
    """(source, image) by erofs-utils: root inode other than 1, inline tails, compact inodes, shared xattrs."""
    source = base / "source"
    (source / "sub" / "many").mkdir(parents=True)
    for number in range(300):
        (source / "sub" / "many" / f"{number:03}-{'x' * (number % 50)}").write_bytes(os.urandom(number * 37))
        os.setxattr(source / "sub" / "many" / f"{number:03}-{'x' * (number % 50)}", "user.same", b"shared value")
    (source / "large").write_bytes(os.urandom(2_500_000))
    os.link(source / "large", source / "sub" / "large-again")
    (source / "link").symlink_to("sub/many")
    os.mkfifo(source / "fifo")
    os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.utime(source / "large", ns=(1, 1_234_567_890_123_456_789))
    os.chown(source / "sub", 70000, 80000)
    return source, make_image(source, base / "image")


def test_tree_of_a_foreign_image_is_identical(tmp_path: Path) -> None:
    source, image = make_foreign_image(tmp_path)
    with mounted(image, tmp_path / "mount", tmp_path / "run"):
        assert_same(scan_tree(source), scan_tree(tmp_path / "mount"))


def test_nothing_at_hand_gives_the_same_tree(tmp_path: Path) -> None:
    """Every single byte has to be waited for, in worker threads."""
    source, image = make_foreign_image(tmp_path)
    with mounted(image, tmp_path / "mount", tmp_path / "run", "--cold"):
        assert_same(scan_tree(source), scan_tree(tmp_path / "mount"))
        assert known_mounts(tmp_path / "run")[0].stats["requests_waited"] >= 300


def test_beyond_four_gigabytes(tmp_path: Path) -> None:
    """Offsets of more than 32 bits, in a sparse file."""
    (tmp_path / "source").mkdir()
    size, places = (5 << 30) + 123, [0, (4 << 30) - 1, (4 << 30) + 4096, (5 << 30) + 100]
    with open(tmp_path / "source" / "huge", "wb") as file:
        for place in places:
            os.pwrite(file.fileno(), b"here", place)
        os.truncate(file.fileno(), size)
    keys = make_keys(tmp_path)
    encrypt_tree(tmp_path / "source", Layout(str(tmp_path / "layout"), create=True), keys)
    with (
        mounted(tmp_path / "layout", tmp_path / "mount", tmp_path / "run", "--key", str(keys.recipient_file)),
        open(tmp_path / "mount" / "huge", "rb") as file,
    ):
        assert os.fstat(file.fileno()).st_size == size
        for place in places:
            start = max(0, place - 4)
            assert (
                os.pread(file.fileno(), 12, start) == (bytes(place - start) + b"here").ljust(12, b"\0")[: size - start]
            )
        assert os.pread(file.fileno(), 3 << 20, 1 << 30) == bytes(3 << 20)


def test_hard_links_share_an_inode(plain: Path) -> None:
    first, second = (plain / "file").stat(), (plain / "sub" / "second-name").stat()
    assert (first.st_ino, first.st_nlink) == (second.st_ino, 2)


def test_inode_numbers_agree_between_listing_and_stat(plain: Path) -> None:
    with os.scandir(plain) as entries:
        for entry in entries:
            assert entry.inode() == entry.stat(follow_symlinks=False).st_ino
    assert plain.stat().st_ino == 1


def test_dot_and_dot_dot_are_listed(odd: tuple[Path, Path]) -> None:
    """Python's listings leave them out: ask the C library."""
    listed = subprocess.run(["ls", "-fa", odd[1] / "empty-directory"], check=True, capture_output=True).stdout.split()
    assert sorted(listed) == [b".", b".."]


def test_blocks_are_those_of_the_size(odd: tuple[Path, Path]) -> None:
    for name, blocks in [("empty", 0), ("one", 8), ("block", 8), ("block+1", 16)]:
        assert (odd[1] / name).stat().st_blocks == blocks


def test_long_directory_is_listed_completely(tmp_path: Path) -> None:
    names = [b"%05d-%s" % (number, b"n" * (number % 40)) for number in range(20_000)]
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    items += [(Entry(name, FILE), b"") for name in names]
    write_image(tmp_path / "image", items)
    with mounted(tmp_path / "image", tmp_path / "mount", tmp_path / "run"):
        assert sorted(os.listdir(os.fsencode(tmp_path / "mount"))) == names
        assert sum(1 for entry in os.scandir(tmp_path / "mount") if entry.stat().st_size == 0) == len(names)


def test_listing_resumes_where_it_was_left(tmp_path: Path) -> None:
    """telldir and seekdir: positions stay good, whatever was listed since."""
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    items += [(Entry(b"%04d" % number, FILE), b"") for number in range(3000)]
    write_image(tmp_path / "image", items)
    with mounted(tmp_path / "image", tmp_path / "mount", tmp_path / "run"):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.opendir.restype = ctypes.c_void_p
        libc.readdir64.restype = ctypes.c_void_p
        libc.readdir64.argtypes = libc.telldir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
        libc.telldir.restype = ctypes.c_long
        libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
        handle = libc.opendir(os.fsencode(tmp_path / "mount"))
        try:
            followed: list[tuple[int, bytes]] = []
            while True:
                place = libc.telldir(handle)
                record = libc.readdir64(handle)
                if not record:
                    break
                followed.append((place, ctypes.string_at(record + 19)))
            assert len({name for _, name in followed}) == 3002
            for place, name in random.Random(1).sample(followed, 200):
                libc.seekdir(handle, place)
                assert ctypes.string_at(libc.readdir64(handle) + 19) == name
        finally:
            libc.closedir(handle)


def test_walks_at_the_same_time_see_the_same(tmp_path: Path) -> None:
    """What is prepared for one walk must not go astray in another, whatever their order."""
    items: list[Item] = [(Entry(b"", DIRECTORY), b"")]
    for first in range(12):
        items.append((Entry(b"d%02d" % first, DIRECTORY), b""))
        items += [(Entry(b"d%02d/f%03d" % (first, number), FILE), b"") for number in range(first * 40)]
        for second in range(4):
            items.append((Entry(b"d%02d/e%d" % (first, second), DIRECTORY), b""))
            items += [(Entry(b"d%02d/e%d/g%d" % (first, second, number), FILE), b"") for number in range(30)]
    write_image(tmp_path / "image", items)
    expected = sorted(os.fsdecode(entry.path) for entry, *_ in items)
    found: list[list[str]] = []

    def walk(root: str, seed: int) -> None:
        chance = random.Random(seed)
        paths = [""]
        for directory, directories, files in os.walk(root):
            paths += [os.path.relpath(os.path.join(directory, name), root) for name in (*directories, *files)]
            if seed % 3 == 1:
                chance.shuffle(directories)
            elif seed % 3 == 2:
                directories.sort(reverse=True)
        found.append(sorted(paths))

    with mounted(tmp_path / "image", tmp_path / "mount", tmp_path / "run"):
        threads = [threading.Thread(target=walk, args=(str(tmp_path / "mount"), seed)) for seed in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 9


# Names


def test_absent_names(plain: Path) -> None:
    for _ in range(2):  # the second time from the kernel's cache
        assert failure((plain / "absent").stat) == "ENOENT"
        assert failure((plain / "file" / "below").stat) == "ENOTDIR"
    assert failure((plain / ("n" * 256)).stat) == "ENAMETOOLONG"
    assert failure(lambda: os.listdir(plain / "file")) == "ENOTDIR"
    assert failure(lambda: os.readlink(plain / "file")) == "EINVAL"


def test_symbolic_links(plain: Path) -> None:
    assert os.readlink(plain / "link") == "sub/inner"
    assert (plain / "link").stat().st_ino == (plain / "sub" / "inner").stat().st_ino


# Extended attributes


def test_xattr_values_and_errors(plain: Path) -> None:
    assert os.getxattr(plain / "file", "user.one") == b"1"
    assert os.getxattr(plain / "sub", "user.long") == b"x" * 3000
    assert sorted(os.listxattr(plain / "file")) == ["trusted.hidden", "user.one"]
    for name in ("user.absent", "security.capability", "trusted.absent", "system.posix_acl_access"):
        assert failure(partial(os.getxattr, plain / "file", name)) == "ENODATA"


def test_xattr_sizes(plain: Path) -> None:
    """Size 0 asks for the size; one that is too small is ERANGE."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = os.fsencode(plain / "sub")
    assert libc.getxattr(path, b"user.long", None, 0) == 3000
    assert libc.getxattr(path, b"user.long", ctypes.create_string_buffer(2999), 2999) == -1
    assert ctypes.get_errno() == errno.ERANGE
    assert libc.getxattr(path, b"user.long", ctypes.create_string_buffer(3000), 3000) == 3000
    assert libc.listxattr(path, None, 0) == len(b"user.long\0")
    assert libc.listxattr(path, ctypes.create_string_buffer(3), 3) == -1
    assert ctypes.get_errno() == errno.ERANGE


def test_acls_and_capabilities_are_shown(odd: tuple[Path, Path], plain: Path) -> None:
    assert os.getxattr(odd[1] / "setgid", "system.posix_acl_access") == POSIX_ACL
    assert os.getxattr(odd[1] / "sticky-directory", "system.posix_acl_default") == POSIX_ACL
    assert os.getxattr(odd[1] / "setuid", "security.capability") == FILE_CAPABILITY
    assert os.getxattr(plain / "sub" / "inner", "system.posix_acl_access") == POSIX_ACL


# Read-only


MUTATIONS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "open for writing": ("EROFS", lambda root: os.open(root / "file", os.O_WRONLY)),
    "open for both": ("EROFS", lambda root: os.open(root / "file", os.O_RDWR)),
    "open to append": ("EROFS", lambda root: os.open(root / "file", os.O_WRONLY | os.O_APPEND)),
    "open to truncate": ("EROFS", lambda root: os.open(root / "file", os.O_RDONLY | os.O_TRUNC)),
    "create": ("EROFS", lambda root: os.open(root / "new", os.O_CREAT | os.O_WRONLY)),
    "create exclusively": ("EROFS", lambda root: os.open(root / "new", os.O_CREAT | os.O_EXCL | os.O_WRONLY)),
    "temporary file": ("EROFS", lambda root: os.open(root, os.O_TMPFILE | os.O_WRONLY)),
    "truncate": ("EROFS", lambda root: os.truncate(root / "file", 0)),
    "mkdir": ("EROFS", lambda root: os.mkdir(root / "new")),
    "mkdir of what exists": ("EEXIST", lambda root: os.mkdir(root / "sub")),
    "mknod": ("EROFS", lambda root: os.mknod(root / "new", stat.S_IFREG | 0o600)),
    "mkfifo": ("EROFS", lambda root: os.mkfifo(root / "new")),
    "symlink": ("EROFS", lambda root: os.symlink("file", root / "new")),
    "link": ("EROFS", lambda root: os.link(root / "file", root / "new")),
    "unlink": ("EROFS", lambda root: os.unlink(root / "file")),
    "rmdir": ("EROFS", lambda root: os.rmdir(root / "sub" / "inner")),
    "rename": ("EROFS", lambda root: os.rename(root / "file", root / "new")),
    "rename over": ("EROFS", lambda root: os.rename(root / "file", root / "link")),
    "chmod": ("EROFS", lambda root: os.chmod(root / "file", 0o600)),
    "chown": ("EROFS", lambda root: os.chown(root / "file", 1, 1)),
    "lchown": ("EROFS", lambda root: os.lchown(root / "link", 1, 1)),
    "utime": ("EROFS", lambda root: os.utime(root / "file")),
    "utime of a link": ("EROFS", lambda root: os.utime(root / "link", follow_symlinks=False)),
    "setxattr": ("EROFS", lambda root: os.setxattr(root / "file", "user.new", b"1")),
    "replace xattr": ("EROFS", lambda root: os.setxattr(root / "file", "user.one", b"2", os.XATTR_REPLACE)),
    "removexattr": ("EROFS", lambda root: os.removexattr(root / "file", "user.one")),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_nothing_can_be_changed(plain: Path, name: str) -> None:
    expected, call = MUTATIONS[name]
    before = scan_tree(plain)
    assert failure(lambda: call(plain)) == expected
    assert_same(before, scan_tree(plain))


def test_descriptors_for_reading_refuse_changes(plain: Path) -> None:
    descriptor = os.open(plain / "file", os.O_RDONLY)
    try:
        assert failure(lambda: os.write(descriptor, b"x")) == "EBADF"
        assert failure(lambda: os.fchmod(descriptor, 0o600)) == "EROFS"
        assert failure(lambda: os.fchown(descriptor, 1, 1)) == "EROFS"
        assert failure(lambda: os.setxattr(descriptor, "user.new", b"1")) == "EROFS"
        assert failure(lambda: os.ftruncate(descriptor, 0)) == "EINVAL"
        assert failure(lambda: os.posix_fallocate(descriptor, 0, 10)) == "EBADF"
        os.fsync(descriptor)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def test_nothing_can_be_changed_after_a_remount_for_writing(tmp_path: Path) -> None:
    """Root can have the kernel pass changes on: then it is the daemon that refuses them."""
    (tmp_path / "source" / "sub" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "file").write_bytes(b"contents")
    os.link(tmp_path / "source" / "file", tmp_path / "source" / "sub" / "second-name")
    (tmp_path / "source" / "link").symlink_to("file")
    os.setxattr(tmp_path / "source" / "file", "user.one", b"1")
    root = tmp_path / "mount"
    with mounted(make_image(tmp_path / "source", tmp_path / "image"), root, tmp_path / "run"):
        subprocess.run(["mount", "-i", "-o", "remount,rw", root], check=True)
        # The kernel knows what exists, and that a daemon without TMPFILE makes no unnamed files.
        others = {"mkdir of what exists": "EEXIST", "temporary file": "ENOTSUP"}
        for name, (_, call) in MUTATIONS.items():
            assert failure(partial(call, root)) == others.get(name, "EROFS"), name
        assert (root / "file").read_bytes() == b"contents"


# Contents


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[bytes, Path]]:
    """(contents, path in a mount) of a file of 20 MiB with holes, encrypted."""
    base = tmp_path_factory.mktemp("large")
    (base / "source").mkdir()
    contents = bytearray(os.urandom((20 << 20) + 123))
    with open(base / "source" / "file", "wb") as file:
        file.truncate(len(contents))
        for start in range(0, len(contents), 5 << 20):
            hole = (start + (4 << 20), start + (5 << 20))
            contents[slice(*hole)] = bytes(len(contents[slice(*hole)]))
            file.seek(start)
            file.write(contents[start : start + (4 << 20)])
    keys = make_keys(base)
    encrypt_tree(base / "source", Layout(str(base / "layout"), create=True), keys)
    with mounted(base / "layout", base / "mount", base / "run", "--key", str(keys.recipient_file)):
        yield bytes(contents), base / "mount" / "file"


def test_random_reads_equal_the_file(large: tuple[bytes, Path]) -> None:
    contents, path = large
    chance = random.Random(7)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(2000):
            offset = chance.randrange(len(contents))
            size = chance.choice([1, 100, 4096, 4097, 70_000])
            assert os.pread(descriptor, size, offset) == contents[offset : offset + size]
    finally:
        os.close(descriptor)


def test_direct_reads_equal_the_file(large: tuple[bytes, Path]) -> None:
    """O_DIRECT passes by the page cache: requests reach the daemon at the sizes and offsets of the caller."""
    contents, path = large
    chance = random.Random(8)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        for size in (1, 4096, 65536, 1 << 20, 3 << 20):
            buffer = bytearray(size)
            for _ in range(20):
                offset = chance.randrange(len(contents))
                done = os.preadv(descriptor, [buffer], offset)
                assert buffer[:done] == contents[offset : offset + size]
                assert done == min(size, len(contents) - offset)
    finally:
        os.close(descriptor)


def test_reads_at_the_end(large: tuple[bytes, Path]) -> None:
    contents, path = large
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert os.pread(descriptor, 100, len(contents)) == b""
        assert os.pread(descriptor, 100, len(contents) + 5000) == b""
        assert os.pread(descriptor, 100, len(contents) - 3) == contents[-3:]
    finally:
        os.close(descriptor)
    assert path.read_bytes() == contents


def test_concurrent_readers_get_the_right_bytes(large: tuple[bytes, Path]) -> None:
    contents, path = large
    wrong: list[int] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if seed % 2 else 0))
        buffer = bytearray(256 << 10)
        try:
            for _ in range(100):
                offset = chance.randrange(0, len(contents), 4096)
                done = os.preadv(descriptor, [buffer], offset)
                if not done or buffer[:done] != contents[offset : offset + done]:
                    wrong.append(offset)
        finally:
            os.close(descriptor)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_mapping(large: tuple[bytes, Path]) -> None:
    contents, path = large
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        for offset in range(0, len(contents), 777_777):
            assert mapping[offset : offset + 10] == contents[offset : offset + 10]


def test_repeated_reads_come_from_the_kernel(tmp_path: Path) -> None:
    """`keep_cache`: opening again does not ask the daemon for contents it gave before."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(os.urandom(1 << 20))
    with mounted(make_image(tmp_path / "source", tmp_path / "image"), tmp_path / "mount", tmp_path / "run") as status:
        (tmp_path / "mount" / "file").read_bytes()
        before = _bytes_read(tmp_path / "run", status.pid)
        for _ in range(3):
            (tmp_path / "mount" / "file").read_bytes()
            os.listdir(tmp_path / "mount")
            assert failure((tmp_path / "mount" / "absent").stat) == "ENOENT"
        assert _bytes_read(tmp_path / "run", status.pid) == before


def _bytes_read(runtime: Path, pid: int) -> int:
    found = [status for status in known_mounts(runtime) if status.pid == pid]
    return found[0].stats["bytes_read"]


# The filesystem as a whole


def test_statfs(plain: Path) -> None:
    status = os.statvfs(plain)
    assert (status.f_bsize, status.f_frsize, status.f_namemax) == (4096, 4096, 255)
    assert (status.f_bfree, status.f_bavail, status.f_ffree) == (0, 0, 0)
    assert status.f_blocks > 0
    assert status.f_files == 5
    assert status.f_flag & os.ST_RDONLY


def test_mount_options_as_the_kernel_shows_them(plain: Path, odd: tuple[Path, Path]) -> None:
    mount = top_mount(str(plain))
    assert mount is not None
    assert (mount.filesystem_type, mount.source) == ("fuse.encfs", "encfs")
    assert {"ro", "nosuid", "nodev"} <= set(mount.options.split(","))
    asked = top_mount(str(odd[1]))
    assert asked is not None
    assert not {"nosuid", "nodev"} & set(asked.options.split(","))


def test_permissions_and_acls_are_enforced_for_others(tmp_path: Path) -> None:
    """The image's modes and ACLs decide, by the kernel's own rules."""
    source = tmp_path / "source"
    source.mkdir()
    for name, mode in [("public", 0o644), ("private", 0o600), ("listed", 0o640)]:
        (source / name).write_text(name)
        (source / name).chmod(mode)
    os.setxattr(source / "listed", "system.posix_acl_access", ACL_FOR_1000)
    for directory in (tmp_path, *(parent for parent in tmp_path.parents if "pytest" in str(parent))):
        directory.chmod(0o755)
    with mounted(make_image(source, tmp_path / "image"), tmp_path / "mount", tmp_path / "run", "--allow-other"):
        readable = {user: _readable_by(user, tmp_path / "mount") for user in (0, 1000, 1001)}
    assert readable == {0: {"public", "private", "listed"}, 1000: {"public", "listed"}, 1001: {"public"}}


def test_others_stay_out_unless_let_in(plain: Path) -> None:
    assert _readable_by(1000, plain) == set()


def _readable_by(user: int, directory: Path) -> set[str]:
    found = subprocess.run(
        ["sh", "-c", f"cd {directory} && for name in *; do test -f $name && cat $name >/dev/null && echo $name; done"],
        user=user,
        group=user,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
    )
    return set(found.stdout.split())
