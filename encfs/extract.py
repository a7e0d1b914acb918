"""Write an image's tree, or a part of it, to a directory: all of it or nothing appears under the target's name.

Everything is created relative to directory descriptors that were opened without following links, in a directory of our
own beside the target, which is renamed in the end. Not here: reading (`encfs.erofs.reader`, `encfs.format`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from encfs.erofs.reader import ErofsReader, Inode
from encfs.errors import ConflictError, NotFoundError, StorageError
from encfs.format.readahead import MAX_WINDOW, ReadAhead, Stream
from encfs.progress import Progress

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What was written: names (links counted each), and bytes of file contents without holes.

    `skipped` counts what the user may not create or set (devices, owners, privileged attributes)."""

    names: int
    size: int
    skipped: int


def extract_tree(reader: ErofsReader, ahead: ReadAhead, target: Path, progress: Progress) -> ExtractResult:
    """Extract the whole tree to `target`, which must not exist or be an empty directory.

    Raises: ConflictError, StorageError; IntegrityError and others from the volume. On failure nothing is left behind.
    """
    staging = _prepare(target)
    try:
        extraction = _Extraction(reader, ahead, progress, staging)
        try:
            extraction.run()
        finally:
            extraction.close()
        with _storage_errors(target):
            os.rename(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return ExtractResult(extraction.names, extraction.size, extraction.skipped)


def _prepare(target: Path) -> Path:
    """A fresh private directory beside `target`."""
    with _storage_errors(target):
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise ConflictError(f"{target} exists and is no directory", hint="choose another target")
        if target.is_dir() and any(target.iterdir()):
            raise ConflictError(f"{target} is not empty", hint="choose a new or an empty directory")
        if not target.absolute().parent.is_dir():
            raise NotFoundError(f"{target.absolute().parent} does not exist", hint="create it first")
        staging = target.absolute().parent / f".{target.name}.partial-{secrets.token_hex(6)}"
        staging.mkdir(mode=0o700)
    return staging


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from None


class _Extraction:
    """One extraction under way. Directories get their attributes when everything in them is there."""

    def __init__(self, reader: ErofsReader, ahead: ReadAhead, progress: Progress, staging: Path) -> None:
        self._reader = reader
        self._ahead = ahead
        self._progress = progress
        self._staging = staging
        self._root = os.open(staging, _DIRECTORY_FLAGS)
        self._buffer = memoryview(bytearray(MAX_WINDOW))
        self._linked: dict[int, bytes] = {}
        self._privileged = os.geteuid() == 0
        self.names = self.size = self.skipped = 0

    def close(self) -> None:
        os.close(self._root)

    def run(self) -> None:
        root = self._reader.inode(self._reader.root)
        # (path, inode, open directory, its remaining entries)
        stack = [(b"", root, os.dup(self._root), self._reader.entries(root))]
        try:
            while stack:
                path, inode, directory, entries = stack[-1]
                entry = next(entries, None)
                if entry is None:
                    with _storage_errors(self._shown(path)):
                        self._set_attributes(directory, inode)
                    os.close(directory)
                    stack.pop()
                    continue
                if entry.name in (b".", b".."):
                    continue
                child_path = path + b"/" + entry.name if path else entry.name
                child = self._reader.inode(entry.nid)
                self.names += 1
                with _storage_errors(self._shown(child_path)):
                    if stat.S_ISDIR(child.mode):
                        os.mkdir(entry.name, 0o700, dir_fd=directory)
                        opened = os.open(entry.name, _DIRECTORY_FLAGS, dir_fd=directory)
                        stack.append((child_path, child, opened, self._reader.entries(child)))
                    else:
                        self._create(child_path, entry.name, child, directory)
        finally:
            for _, _, directory, _ in stack:
                os.close(directory)

    def _shown(self, path: bytes) -> Path:
        return self._staging / os.fsdecode(path)

    def _create(self, path: bytes, name: bytes, inode: Inode, directory: int) -> None:
        if inode.nlink > 1:
            first = self._linked.setdefault(inode.nid, path)
            if first is not path:
                os.link(first, name, src_dir_fd=self._root, dst_dir_fd=directory, follow_symlinks=False)
                return
        kind = stat.S_IFMT(inode.mode)
        if kind == stat.S_IFREG:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(name, flags, 0o600, dir_fd=directory)
            try:
                self._write_contents(file, inode)
                self._set_attributes(file, inode)
            finally:
                os.close(file)
            return
        if kind == stat.S_IFLNK:
            os.symlink(self._reader.readlink(inode), name, dir_fd=directory)
        elif self._privileged or kind in (stat.S_IFIFO, stat.S_IFSOCK):
            os.mknod(name, kind | 0o600, inode.rdev, dir_fd=directory)
        else:
            self.skipped += 1
            self._linked.pop(inode.nid, None)
            return
        self._set_special_attributes(name, inode, directory)

    def _write_contents(self, file: int, inode: Inode) -> None:
        position = 0
        for start, length in self._reader.extents(inode, 0, inode.size):
            if start is not None:
                os.lseek(file, position, os.SEEK_SET)
                self._copy(file, start, length)
            position += length
        os.ftruncate(file, inode.size)

    def _copy(self, file: int, start: int, length: int) -> None:
        stream = self._ahead.stream(start, start + length)
        try:
            position = start
            while position < start + length:
                data = self._take(stream, position, min(MAX_WINDOW, start + length - position))
                view = data
                while view:
                    view = view[os.write(file, view) :]
                position += len(data)
                self.size += len(data)
                self._progress.advance(len(data))
        finally:
            stream.close()

    def _take(self, stream: Stream, offset: int, size: int) -> memoryview:
        taken = stream.take(offset, size)
        while isinstance(taken, Future):
            taken.exception()
            taken = stream.take(offset, size)
        if taken is not None:
            return taken
        buffer = self._buffer[:size]
        self._ahead.volume.read_into(offset, buffer)
        return buffer

    def _set_attributes(self, file: int, inode: Inode) -> None:
        """Owner first: changing it clears setuid and capabilities."""
        if self._may(lambda: os.fchown(file, inode.uid, inode.gid)):
            for name, value in self._reader.xattrs(inode).items():
                self._may(lambda name=name, value=value: os.setxattr(file, name, value))  # type: ignore[misc]
        os.fchmod(file, stat.S_IMODE(inode.mode))
        os.utime(file, ns=(inode.mtime_ns, inode.mtime_ns))

    def _set_special_attributes(self, name: bytes, inode: Inode, directory: int) -> None:
        """The same for what cannot be opened: links, devices, pipes, sockets."""
        self._may(lambda: os.chown(name, inode.uid, inode.gid, dir_fd=directory, follow_symlinks=False))
        # os.setxattr knows no directory descriptors: the entry is reached through that of its directory.
        entry = b"/proc/self/fd/%d/%s" % (directory, name)
        for key, value in self._reader.xattrs(inode).items():
            self._may(lambda key=key, value=value: os.setxattr(entry, key, value, follow_symlinks=False))  # type: ignore[misc]
        if not stat.S_ISLNK(inode.mode):
            os.chmod(name, stat.S_IMODE(inode.mode), dir_fd=directory)
        os.utime(name, ns=(inode.mtime_ns, inode.mtime_ns), dir_fd=directory, follow_symlinks=False)

    def _may(self, action: Callable[[], None]) -> bool:
        """Do what may be refused to an ordinary user; count it where it is."""
        try:
            action()
        except OSError as error:
            if self._privileged and error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self.skipped += 1
            return False
        return True
