"""Write an image's tree, or a part of it, to a directory: all of it or nothing appears under the target's name.

Everything is created relative to directory descriptors that were opened without following links, in a directory of our
own beside the target, which is renamed in the end. Not here: reading (`encfs.erofs.reader`, `encfs.format`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from encfs.erofs.spool import open_temporary, storage_errors
from encfs.erofs.structures import printable
from encfs.erofs.tree import DirectoryEntry, Inode, Tree
from encfs.erofs.walk import WalkBounds
from encfs.errors import ConflictError, NotFoundError, StorageError
from encfs.format.readahead import MAX_WINDOW, ReadAhead, Stream
from encfs.progress import Progress

#: Levels of a tree, the deepest ones, whose listings are kept while what is below them is written.
_LISTED = 64
#: Bytes of a path that system calls take, with the NUL at its end.
_PATH_MAX = 4096
#: What chown(2) takes for "leave it as it is": no owner that a file can have.
_UNCHANGED = (1 << 32) - 1
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """What was written: names (links counted each), and bytes of file contents without holes.

    `skipped` counts what the user may not create or set (devices, owners, privileged attributes)."""

    names: int
    size: int
    skipped: int


def extract_tree(reader: Tree, ahead: ReadAhead, target: Path, progress: Progress) -> ExtractResult:
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
        _remove_tree(staging)
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
        raise _storage_error(path, error) from None


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{printable(os.fsencode(path))}: {error.strerror or error}")


def _replace(directory: int, name: bytes) -> int:
    """Open the directory `name` in `directory`, which is closed if that went well."""
    opened = os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
    os.close(directory)
    return opened


def _remove_tree(root: Path) -> None:
    """Remove a directory of our own with everything in it, as far as that is possible.

    Unlike `shutil.rmtree` at any depth, and also where an ordinary user has made directories that forbid it.
    """
    with contextlib.suppress(OSError):
        directory = os.open(root, _DIRECTORY_FLAGS)
        try:
            os.fchmod(directory, 0o700)
            below: list[bytes] = []
            while True:
                name = _unlink_files(directory)
                if name is not None:
                    os.chmod(name, 0o700, dir_fd=directory)
                    directory = _replace(directory, name)
                    below.append(name)
                elif below:
                    directory = _replace(directory, b"..")
                    os.rmdir(below.pop(), dir_fd=directory)
                else:
                    break
        finally:
            os.close(directory)
        os.rmdir(root)


def _unlink_files(directory: int) -> bytes | None:
    """Unlink what is no directory, up to the first directory: its name, or None where there is none."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return os.fsencode(entry.name)
            os.unlink(entry.name, dir_fd=directory)
    return None


class _Level:
    """A directory being filled: its inode, the length of its path, and where its listing is."""

    __slots__ = ("_place", "entries", "inode", "path_size")

    def __init__(self, inode: Inode, path_size: int, entries: Iterator[DirectoryEntry]) -> None:
        self.inode = inode
        self.path_size = path_size
        #: None: the listing was let go, and is begun again where it was.
        self.entries: Iterator[DirectoryEntry] | None = entries
        self._place = 0

    def next_entry(self, reader: Tree) -> DirectoryEntry | None:
        if self.entries is None:
            self.entries = reader.entries(self.inode, self._place)
        entry = next(self.entries, None)
        if entry is not None:
            self._place = entry.next
        return entry


class _Links:
    """Where files with several names were written first: in a temporary database, since there may be any number."""

    def __init__(self) -> None:
        self._spool: sqlite3.Connection | None = None

    def first_path(self, nid: int, path: bytearray) -> bytes | None:
        """The path that this file was given first; None where it is given its first now, by which it can be linked."""
        if self._spool is None:
            self._spool = open_temporary("CREATE TABLE first (nid INTEGER PRIMARY KEY, path BLOB NOT NULL)")
        with storage_errors():
            row = self._spool.execute("SELECT path FROM first WHERE nid = ?", (nid,)).fetchone()
            # link(2) takes no longer one: further names become files of their own.
            if row is None and len(path) < _PATH_MAX:
                self._spool.execute("INSERT INTO first VALUES (?, ?)", (nid, bytes(path)))
        return None if row is None else bytes(row[0])

    def forget(self, nid: int) -> None:
        if self._spool is not None:
            self._spool.execute("DELETE FROM first WHERE nid = ?", (nid,))

    def close(self) -> None:
        if self._spool is not None:
            self._spool.close()


class _Extraction:
    """One extraction under way. Directories get their attributes when everything in them is there."""

    def __init__(self, reader: Tree, ahead: ReadAhead, progress: Progress, staging: Path) -> None:
        self._reader = reader
        self._ahead = ahead
        self._progress = progress
        self._staging = staging
        self._root = os.open(staging, _DIRECTORY_FLAGS)
        self._buffer = memoryview(bytearray(MAX_WINDOW))
        self._links = _Links()
        #: Of what is being written, from the root of the tree.
        self._path = bytearray()
        self._privileged = os.geteuid() == 0
        self.names = self.size = self.skipped = 0

    def close(self) -> None:
        self._links.close()
        os.close(self._root)

    def run(self) -> None:
        bounds = WalkBounds(self._reader)
        root = self._reader.inode(self._reader.root)
        # Directories from the root down to the one being filled. Only that is open, so that depth costs no descriptors;
        # its parent is reached through "..", since all of it is ours.
        stack = [_Level(root, 0, self._reader.entries(root))]
        directory = os.dup(self._root)
        try:
            while stack:
                level = stack[-1]
                del self._path[level.path_size :]
                entry = level.next_entry(self._reader)
                if entry is None:
                    directory = self._finish_directory(level.inode, directory, is_root=len(stack) == 1)
                    stack.pop()
                    continue
                if entry.name in (b".", b".."):
                    continue
                self._path += b"/" + entry.name if self._path else entry.name
                child = self._reader.inode(entry.nid)
                bounds.check(level.inode, child, len(self._path))
                self.names += 1
                with self._storage_errors():
                    if stat.S_ISDIR(child.mode):
                        os.mkdir(entry.name, 0o700, dir_fd=directory)
                        directory = _replace(directory, entry.name)
                        stack.append(_Level(child, len(self._path), self._reader.entries(child)))
                        if len(stack) > _LISTED:
                            stack[-_LISTED - 1].entries = None
                    else:
                        self._create(entry.name, child, directory)
        finally:
            os.close(directory)

    def _finish_directory(self, inode: Inode, directory: int, *, is_root: bool) -> int:
        """Set the attributes of a directory that has everything in it; its parent, open (its own again for the root).

        The parent is opened first: afterwards its mode may forbid that.
        """
        with self._storage_errors():
            finished = os.dup(directory)
            try:
                if not is_root:
                    directory = _replace(directory, b"..")
                self._set_attributes(finished, inode)
            finally:
                os.close(finished)
        return directory

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """The same of what is being written. Its path is put together in case of need: it may be long."""
        try:
            yield
        except OSError as error:
            raise _storage_error(self._staging / os.fsdecode(bytes(self._path)), error) from None

    def _create(self, name: bytes, inode: Inode, directory: int) -> None:
        if inode.nlink > 1:
            first = self._links.first_path(inode.nid, self._path)
            if first is not None:
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
            self._links.forget(inode.nid)
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
        """Owner first: changing it clears setuid and capabilities.

        Where the owner cannot be kept, setuid, setgid, capabilities and access lists are dropped, as `cp -a` does: they
        were meant for somebody else than the user who extracts.
        """
        mode = stat.S_IMODE(inode.mode)
        kept = self._give_owner(inode, lambda: os.fchown(file, inode.uid, inode.gid))
        if not kept:
            mode &= ~(stat.S_ISUID | stat.S_ISGID)
        for name, value in self._reader.xattrs(inode).items():
            if kept or name.startswith(b"user."):
                self._may(lambda name=name, value=value: os.setxattr(file, name, value))  # type: ignore[misc]
            else:
                self.skipped += 1
        os.fchmod(file, mode)
        os.utime(file, ns=(inode.mtime_ns, inode.mtime_ns))

    def _set_special_attributes(self, name: bytes, inode: Inode, directory: int) -> None:
        """The same for what cannot be opened: links, devices, pipes, sockets."""
        self._give_owner(inode, lambda: os.chown(name, inode.uid, inode.gid, dir_fd=directory, follow_symlinks=False))
        # os.setxattr knows no directory descriptors: the entry is reached through that of its directory.
        entry = b"/proc/self/fd/%d/%s" % (directory, name)
        for key, value in self._reader.xattrs(inode).items():
            self._may(lambda key=key, value=value: os.setxattr(entry, key, value, follow_symlinks=False))  # type: ignore[misc]
        if not stat.S_ISLNK(inode.mode):
            os.chmod(name, stat.S_IMODE(inode.mode), dir_fd=directory)
        os.utime(name, ns=(inode.mtime_ns, inode.mtime_ns), dir_fd=directory, follow_symlinks=False)

    def _give_owner(self, inode: Inode, change: Callable[[], None]) -> bool:
        if _UNCHANGED in (inode.uid, inode.gid):
            self.skipped += 1
            return False
        return self._may(change)

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
