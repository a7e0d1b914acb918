"""Look into an opened artifact without mounting it: list names, read one file. `extract` writes trees to a disk."""

from __future__ import annotations

import base64
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from encfs.artifact import Artifact
from encfs.erofs.reader import ErofsReader
from encfs.erofs.tree import Inode, Tree
from encfs.erofs.walk import walk
from encfs.errors import SourceError
from encfs.format.plaintext import Volume
from encfs.image.artifact import image_parts
from encfs.image.merged import MergedTree
from encfs.image.stack import VolumeStack, open_readers

#: Bytes of a file that are read at a time.
READ_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """The bytes of an artifact and the filesystem in them."""

    volume: Volume
    tree: Tree


@dataclass(frozen=True, slots=True)
class Listed:
    """One name: its path from the root of the image, without a leading slash; `target` where it is a symbolic link."""

    path: bytes
    inode: Inode
    target: bytes | None

    def to_json(self) -> dict[str, object]:
        """`path_base64` and `target_base64` have the exact bytes where the name is not UTF-8."""
        inode = self.inode
        document = _text_member("path", self.path) | {
            "type": inode.kind,
            "mode": f"{stat.S_IMODE(inode.mode):04o}",
            "uid": inode.uid,
            "gid": inode.gid,
            "size": inode.size,
            "links": inode.nlink,
            "mtime_ns": inode.mtime_ns,
        }
        return document | (_text_member("target", self.target) if self.target is not None else {})

    def name(self) -> str:
        return self.path.decode("utf-8", "surrogateescape")

    def long_line(self) -> str:
        """The line that `ls -l` would show, with the time in UTC."""
        inode = self.inode
        time = _shown_time(inode.mtime_ns // 1_000_000_000)
        arrow = f" -> {self.target.decode('utf-8', 'surrogateescape')}" if self.target is not None else ""
        mode = stat.filemode(inode.mode)
        return f"{mode} {inode.nlink:>3} {inode.uid:>6} {inode.gid:>6} {inode.size:>14} {time} {self.name()}{arrow}"


def _shown_time(seconds: int) -> str:
    """A time (seconds since 1970) in UTC; as seconds, after an `@`, where it is beyond the years 1 to 9999."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M")
    except OverflowError:
        return f"@{seconds}"


def open_image(artifact: Artifact) -> Image:
    """The filesystem of an artifact; of a container image what its layers make together.

    Raises: UnsupportedError for several volumes that are no layers, FormatError.
    """
    parts = image_parts(artifact)
    if not parts.layered:
        volume = parts.volumes[0]
        return Image(volume, ErofsReader(volume.read, volume.size))
    stack = VolumeStack(parts.volumes)
    return Image(stack, MergedTree(open_readers(stack.read, [volume.size for volume in parts.volumes])))


def listing(image: Image, path: bytes = b"", *, recursive: bool = False) -> Iterator[Listed]:
    """What is in the directory at `path`, or the one entry if it is no directory; everything below with `recursive`.

    The path is looked up at once, the rest as it is asked for.
    Raises: NotFoundError, FormatError, what the volume raises.
    """
    prefix = b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))
    # A trailing slash, or nothing at all, asks for what a link leads to.
    top = image.tree.resolve(prefix, follow=path.endswith(b"/") or not prefix)
    if not stat.S_ISDIR(top.mode):
        return iter([_listed(image.tree, prefix, top)])
    return _contents(image.tree, top, prefix + b"/" if prefix else b"", recursive)


def _contents(tree: Tree, top: Inode, start: bytes, recursive: bool) -> Iterator[Listed]:
    if recursive:
        for below, inode in walk(tree, top):
            yield _listed(tree, start + below, inode)
        return
    for entry in tree.entries(top):
        if entry.name not in (b".", b".."):
            yield _listed(tree, start + entry.name, tree.inode(entry.nid))


def file_size(image: Image, path: bytes) -> int:
    """Bytes of the regular file at `path`. Raises: NotFoundError; SourceError where it is something else."""
    return _file(image, path).size


def read_file(image: Image, path: bytes) -> Iterator[bytes]:
    """The contents of the regular file at `path`, piece by piece. Raises: as `file_size`, what the volume raises."""
    inode = _file(image, path)
    for offset in range(0, inode.size, READ_SIZE):
        yield image.tree.read(inode, offset, min(READ_SIZE, inode.size - offset))


def _file(image: Image, path: bytes) -> Inode:
    inode = image.tree.resolve(path)
    if not stat.S_ISREG(inode.mode):
        kind = inode.kind
        raise SourceError(f"{path.decode('utf-8', 'backslashreplace')} is a {kind}, not a regular file")
    return inode


def _listed(tree: Tree, path: bytes, inode: Inode) -> Listed:
    return Listed(path, inode, tree.readlink(inode) if stat.S_ISLNK(inode.mode) else None)


def _text_member(name: str, value: bytes) -> dict[str, object]:
    try:
        return {name: value.decode()}
    except UnicodeDecodeError:
        return {name: value.decode("utf-8", "replace"), f"{name}_base64": base64.b64encode(value).decode()}
