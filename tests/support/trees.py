"""Trees of files for tests: one with every odd kind of file, and an exact comparison of two.

Paths are bytes, and every level is opened relative to its parent's descriptor: names need not be UTF-8, and paths may
be longer than PATH_MAX.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from encfs.erofs.tree import Inode, Tree
from encfs.erofs.walk import walk

#: ACL for user 1000 of read and write, in the form in which the kernel takes and gives it.
POSIX_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, number)
    for tag, permissions, number in [
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, 1000),
        (0x04, 4, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    ]
)
#: security.capability: cap_net_bind_service, permitted and effective.
FILE_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


#: Longest path given to the kernel at once (bytes).
_PATH_STEP = 4000
#: Contents are hashed in pieces of this size (bytes), and pieces of zeros are left out: holes need not be read.
_PIECE = 1 << 18


@dataclass(slots=True)
class Node:
    """Everything of one path that two equal trees share. `group` are all paths of the same inode."""

    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    target: bytes
    digest: str
    xattrs: dict[bytes, bytes]
    nlink: int
    group: tuple[bytes, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Scope:
    """What a comparison leaves out, where a side cannot have it."""

    owners: bool = True
    xattrs: bool = True
    mtimes: bool = True
    #: Directories' link counts differ between filesystems and are compared only where both are EROFS.
    directory_links: bool = False


def scan_tree(root: Path | bytes, *, contents: bool = True, count_links: bool = False) -> dict[bytes, Node]:
    """Every path below `root`, and b"" for itself, as a filesystem shows it.

    `count_links` counts the names that are met, for a tree whose files have further names outside it.
    """
    nodes: dict[bytes, Node] = {}
    groups: dict[tuple[int, int], list[bytes]] = {}
    pending = [b""]
    base = os.fsencode(root)
    while pending:
        path = pending.pop()
        with open_directory(base, path) as descriptor:
            if not path:
                nodes[path] = _scan_node(descriptor, None, os.stat(descriptor), contents)
            for name in os.listdir(f"/proc/self/fd/{descriptor}".encode()):
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                below = path + b"/" + name if path else name
                nodes[below] = _scan_node(descriptor, name, status, contents)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(below)
                elif status.st_nlink > 1:
                    groups.setdefault((status.st_dev, status.st_ino), []).append(below)
    if count_links:
        for group in groups.values():
            for path in group:
                nodes[path].nlink = len(group)
    _set_groups(nodes, [group for group in groups.values() if not count_links or len(group) > 1])
    return nodes


def scan_image(reader: Tree, *, contents: bool = True) -> dict[bytes, Node]:
    """The same of an image through our reader."""
    root = reader.inode(reader.root)
    nodes = {b"": _image_node(reader, root, contents)}
    groups: dict[int, list[bytes]] = {}
    for path, inode in walk(reader, root):
        nodes[path] = _image_node(reader, inode, contents)
        if not stat.S_ISDIR(inode.mode) and inode.nlink > 1:
            groups.setdefault(inode.nid, []).append(path)
    _set_groups(nodes, groups.values())
    return nodes


def assert_same(left: dict[bytes, Node], right: dict[bytes, Node], scope: Scope = Scope()) -> None:
    """Fail, naming the first differing paths, unless both sides are the same in everything `scope` covers."""
    assert sorted(left.keys() ^ right.keys())[:10] == []
    differences = []
    for path, node in sorted(left.items()):
        one, two = _comparable(node, scope), _comparable(right[path], scope)
        differences += [f"{path!r}: {key}: {one[key]!r} != {two[key]!r}" for key in one if one[key] != two[key]]
    assert not differences, "\n".join(differences[:10])


def _comparable(node: Node, scope: Scope) -> dict[str, object]:
    fields: dict[str, object] = {
        "mode": oct(node.mode),
        "rdev": node.rdev,
        "target": node.target,
        "digest": node.digest,
        "group": node.group,
    }
    if not stat.S_ISDIR(node.mode):
        fields |= {"size": node.size, "nlink": node.nlink}
    elif scope.directory_links:
        fields["nlink"] = node.nlink
    if scope.owners:
        fields |= {"uid": node.uid, "gid": node.gid}
    if scope.mtimes:
        fields["mtime_ns"] = node.mtime_ns
    if scope.xattrs:
        fields["xattrs"] = node.xattrs
    return fields


def _set_groups(nodes: dict[bytes, Node], groups: Iterable[list[bytes]]) -> None:
    for group in groups:
        for path in group:
            nodes[path].group = tuple(sorted(group))


def _scan_node(descriptor: int, name: bytes | None, status: os.stat_result, contents: bool) -> Node:
    mode = status.st_mode
    full = f"/proc/self/fd/{descriptor}/".encode() + (name or b".")
    target, digest = b"", ""
    if stat.S_ISLNK(mode) and name is not None:
        target = os.readlink(name, dir_fd=descriptor)
    elif stat.S_ISREG(mode) and contents:
        with open(full, "rb", buffering=0) as file:
            digest = _digest(_file_pieces(file.fileno(), status.st_size))
    xattrs = {
        os.fsencode(key): os.getxattr(full, key, follow_symlinks=False)
        for key in os.listxattr(full, follow_symlinks=False)
    }
    return Node(
        mode=mode,
        uid=status.st_uid,
        gid=status.st_gid,
        rdev=status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        target=target,
        digest=digest,
        xattrs=xattrs,
        nlink=status.st_nlink,
    )


def digest_bytes(content: bytes) -> str:
    """The digest of a regular file with this content."""
    return _digest((offset, content[offset : offset + _PIECE]) for offset in range(0, len(content), _PIECE))


def _digest(pieces: Iterable[tuple[int, bytes]]) -> str:
    hasher = hashlib.sha256()
    for offset, piece in pieces:
        if piece.count(0) != len(piece):
            hasher.update(struct.pack("<QQ", offset, len(piece)) + piece)
    return hasher.hexdigest()


def _file_pieces(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < size:
        try:
            position = os.lseek(descriptor, position, os.SEEK_DATA) & -_PIECE
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return
        yield position, os.pread(descriptor, _PIECE, position)
        position += _PIECE


def _image_pieces(reader: Tree, inode: Inode) -> Iterator[tuple[int, bytes]]:
    offset = following = 0
    for place, length in reader.extents(inode, 0, inode.size):
        if place is not None:
            for position in range(max(following, offset & -_PIECE), offset + length, _PIECE):
                yield position, reader.read(inode, position, _PIECE)
                following = position + _PIECE
        offset += length


def _image_node(reader: Tree, inode: Inode, contents: bool) -> Node:
    digest = ""
    if stat.S_ISREG(inode.mode) and contents:
        digest = _digest(_image_pieces(reader, inode))
    return Node(
        mode=inode.mode,
        uid=inode.uid,
        gid=inode.gid,
        rdev=inode.rdev,
        size=inode.size,
        mtime_ns=inode.mtime_ns,
        target=reader.readlink(inode) if stat.S_ISLNK(inode.mode) else b"",
        digest=digest,
        xattrs=reader.xattrs(inode),
        nlink=inode.nlink,
    )


@contextmanager
def open_directory(base: bytes, path: bytes) -> Iterator[int]:
    """A descriptor of the directory at `path` below `base`, reached in steps that the kernel takes."""
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while path:
            cut = path.rfind(b"/", 0, _PATH_STEP) if len(path) > _PATH_STEP else len(path)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            following = os.open(path[:cut], flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor, path = following, path[cut + 1 :]
        yield descriptor
    finally:
        os.close(descriptor)


def make_odd_tree(path: Path, *, depth: int = 60, names: int = 700) -> None:
    """Fill the new directory `path` with every kind of file that a Linux filesystem has. Needs root.

    Attributes that the filesystem below refuses (trusted.* in a user namespace, file attributes on tmpfs) are left out;
    `depth` levels of directories, `names` files in one directory.
    """
    path.mkdir()
    base = os.fsencode(path)

    def at(name: bytes) -> bytes:
        return base + b"/" + name

    def write(name: bytes, content: bytes) -> bytes:
        with open(at(name), "wb") as file:
            file.write(content)
        return at(name)

    for name, size in [(b"empty", 0), (b"one", 1), (b"block", 4096), (b"block-1", 4095), (b"block+1", 4097)]:
        write(name, bytes(i * 7 & 0xFF for i in range(size)))
    write(b"large", os.urandom(3 * 1024 * 1024 + 17))
    for name, mode in [(b"setuid", 0o4755), (b"setgid", 0o2755), (b"sticky", 0o1644), (b"none", 0)]:
        os.chmod(write(name, name), mode)
    _make_sparse_files(at)
    for index in range(256):
        if index not in (0, ord("/"), ord(".")):
            write(bytes([index]), bytes([index]))
    write(b"\xff\xfe not utf-8 \n\t", b"odd")
    write(b"n" * 255, b"long name")
    write("größe 🗝 ".encode(), b"utf-8")
    for name in (b"...", b"..x", b".hidden", b"!before-dots", b"-before-dots"):
        write(name, name)
    os.mkdir(at(b"empty-directory"))
    os.mkdir(at(b"many"))
    for index in range(names):
        write(b"many/%06d-%s" % (index, b"x" * (index % 60)), b"")
    os.mkdir(at(b"sticky-directory"))
    os.chmod(at(b"sticky-directory"), 0o1777)  # noqa: S103
    _make_links_and_devices(at)
    _make_deep(base, depth)
    _set_attributes(at)
    _set_owners_and_times(at)


def _make_sparse_files(at: Callable[[bytes], bytes]) -> None:
    for name, size, data in [
        (b"hole", 1 << 20, []),
        (b"hole-first", (1 << 20) + 5, [(1 << 20, b"12345")]),
        (b"hole-last", 3 << 20, [(0, b"x" * 5000)]),
        (b"holes", 10 << 20, [(0, b"a" * 4096), (1 << 20, b"b" * 100_000), (7 << 20, b"c")]),
        (b"huge-hole", (5 << 30) + 123, [((4 << 30) + 4096, b"beyond 4 GiB"), ((5 << 30) + 100, b"end")]),
    ]:
        with open(at(name), "wb") as file:
            for offset, content in data:
                os.pwrite(file.fileno(), content, offset)
            os.truncate(file.fileno(), size)


def _make_links_and_devices(at: Callable[[bytes], bytes]) -> None:
    os.symlink(b"one", at(b"link"))
    os.symlink(b"/nowhere/\xff", at(b"dangling"))
    os.symlink(b"self", at(b"self"))
    os.symlink(b"t" * 4000, at(b"inline-target"))
    os.symlink(b"t" * 4095, at(b"longest-target"))
    os.link(at(b"one"), at(b"one-again"))
    os.link(at(b"one"), at(b"many/one-in-many"))
    os.link(at(b"link"), at(b"link-again"), follow_symlinks=False)
    os.mkfifo(at(b"fifo"), 0o640)
    os.link(at(b"fifo"), at(b"fifo-again"))
    os.mknod(at(b"null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(at(b"whiteout"), stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(at(b"large-numbers"), stat.S_IFBLK | 0o600, os.makedev(4095, 1048575))
    os.mknod(at(b"disk"), stat.S_IFBLK | 0o660, os.makedev(259, 300))
    with open_directory(at(b""), b"") as descriptor, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{descriptor}/socket")  # sun_path is short, the path of a test's directory is not


def _make_deep(base: bytes, depth: int) -> None:
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for level in range(depth):
        name = b"deep%d" % (level % 7)
        os.mkdir(name, dir_fd=descriptor)
        following = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = following
    file = os.open(b"bottom", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, dir_fd=descriptor)
    os.write(file, b"deep")
    os.close(file)
    os.close(descriptor)


def _set_attributes(at: Callable[[bytes], bytes]) -> None:
    for name, key, value in [
        (b"one", b"user.note", b"value"),
        (b"one", b"user.empty", b""),
        (b"one", b"user.\xff\xfe", bytes(range(256))),
        (b"one", b"trusted.secret", b"t"),
        (b"setuid", b"security.capability", FILE_CAPABILITY),
        (b"setgid", b"system.posix_acl_access", POSIX_ACL),
        (b"sticky-directory", b"system.posix_acl_default", POSIX_ACL),
        (b"empty-directory", b"user.directory", b"d" * 1000),
        (b"many", b"user." + b"k" * 250, b"longest key"),
        (b"link", b"trusted.link", b"of a link"),
        (b"fifo", b"trusted.fifo", b"of a fifo"),
        (b"", b"user.root", b"of the root"),
    ]:
        with suppress(OSError):
            os.setxattr(at(name), key, value, follow_symlinks=False)


def _set_owners_and_times(at: Callable[[bytes], bytes]) -> None:
    os.chown(at(b"block"), 65536, 70000)
    os.chown(at(b"block-1"), 4294967294, 4294967294)
    os.chown(at(b"link"), 1000, 1000, follow_symlinks=False)
    for name, mtime_ns in [
        (b"one", 1_234_567_890_123_456_789),
        (b"block", 0),
        (b"block-1", -1),
        (b"block+1", 5_000_000_000_999_999_999),
        (b"link", 1_000_000_007),
        (b"fifo", 999_999_999),
        (b"empty-directory", 86_400_000_000_000),
    ]:
        os.utime(at(name), ns=(mtime_ns, mtime_ns), follow_symlinks=False)
