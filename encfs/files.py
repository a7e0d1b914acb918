"""The files of an opened artifact, as Python code wants them: list, stat, open, read into memory, extract.

    files.list("weights"), files.stat("config.json").size, files.read("config.json"), files.open("weights/a.bin")

Thread-safe. Paths are `str` (names that are not UTF-8 with surrogate escapes, as `os.fsdecode` gives them) or `bytes`,
with or without a leading slash. Symbolic links stay within the image. Not here: how an artifact is accepted and opened
(`encfs.artifact`), what the commands print (`encfs.browse`).
"""

from __future__ import annotations

import builtins
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from encfs.erofs.structures import printable
from encfs.erofs.tree import Inode, Tree
from encfs.erofs.walk import walk
from encfs.errors import FormatError, NotFoundError, SourceError, UsageError
from encfs.extract import ExtractResult, extract_tree
from encfs.format.plaintext import Volume
from encfs.format.readahead import ReadAhead
from encfs.parallel import ParallelReader, Range, closed_error
from encfs.progress import NoProgress, Progress


class _Forks:
    """How many forks lie between the first process and this one, and a lock of this process's own."""

    def __init__(self) -> None:
        self.count = 0
        self.lock = threading.Lock()
        os.register_at_fork(after_in_child=self._note)

    def _note(self) -> None:
        # Whoever held the lock is not here.
        self.count, self.lock = self.count + 1, threading.Lock()


_forks = _Forks()

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """One name. `path` from the root without a leading slash, `mode` the permission bits, `size` in bytes.

    `kind` is `file`, `directory`, `symlink`, `character-device`, `block-device`, `fifo` or `socket`; `target` is where
    a symbolic link points to, else None.
    """

    path: str
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    mtime_ns: int
    target: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_file(self) -> bool:
        return self.kind == "file"

    @property
    def is_directory(self) -> bool:
        return self.kind == "directory"


@dataclass(frozen=True, slots=True)
class _Open:
    """What one process reads with: of no use to another that was forked from it, which has none of its threads."""

    volume: Volume
    tree: Tree
    parallel: ParallelReader
    forks: int


class Files:
    """A tree over a volume. `close` ends its threads; the volume belongs to whoever opened it."""

    def __init__(
        self,
        volume: Volume,
        tree: Tree,
        *,
        threads: int | None = None,
        after_fork: Callable[[], tuple[Volume, Tree]] | None = None,
    ) -> None:
        """`threads` read large pieces side by side (None: by the number of processors).

        `after_fork` opens the same volume and tree again, in a process that was forked from this one, when they are
        first used there; without it their use is refused.
        """
        self._threads = threads
        self._after_fork = after_fork
        self._closed = False
        self._open = self._opened(volume, tree)

    def _opened(self, volume: Volume, tree: Tree) -> _Open:
        return _Open(volume, tree, ParallelReader(volume, threads=self._threads), _forks.count)

    def _here(self) -> _Open:
        """What this process reads with. Raises: UsageError where nothing is open; what `after_fork` raises."""
        if self._closed:
            raise closed_error()
        if self._open.forks != _forks.count:
            with _forks.lock:
                if self._open.forks != _forks.count:
                    if self._after_fork is None:
                        raise UsageError("the artifact was opened before this process was forked", hint="open it again")
                    self._open = self._opened(*self._after_fork())
        return self._open

    @property
    def _tree(self) -> Tree:
        return self._here().tree

    def list(self, path: AnyPath = "", *, recursive: bool = False) -> Iterator[Entry]:
        """What is in a directory, sorted by name; with `recursive` everything below it, parents first.

        Raises: NotFoundError at once, SourceError where it is no directory; FormatError, IntegrityError and what the
        store raises while it goes on.
        """
        wanted = _clean(path)
        top = self._tree.resolve(wanted)
        if not stat.S_ISDIR(top.mode):
            raise SourceError(f"{printable(wanted)} is no directory")
        return self._entries(wanted, top, recursive)

    def stat(self, path: AnyPath, *, follow_symlinks: bool = True) -> Entry:
        """What stands at a path. Raises: NotFoundError, FormatError, IntegrityError, what the store raises."""
        wanted = _clean(path)
        return self._entry(wanted, self._tree.resolve(wanted, follow=follow_symlinks))

    def exists(self, path: AnyPath) -> bool:
        """Whether something stands at a path, symbolic links followed. Raises: as `stat`, but NotFoundError."""
        try:
            self._tree.resolve(_clean(path))
        except NotFoundError:
            return False
        return True

    def open(self, path: AnyPath, *, buffering: int = 1 << 20) -> io.BufferedReader:
        """A regular file for reading, seekable; `buffering` bytes are read at a time where less is asked for.

        Raises: as `read`. Reading from it raises IntegrityError where bytes are not those that the root commits to.
        """
        return io.BufferedReader(self.open_raw(path), buffering)

    def open_raw(self, path: AnyPath) -> File:
        """The same without a buffer: each call reads just what it asks for."""
        return File(self, *self._regular(path))

    def read(self, path: AnyPath, offset: int = 0, size: int | None = None) -> bytes:
        """At most `size` bytes of a regular file from `offset` (None: to its end).

        Raises: NotFoundError, SourceError where it is no regular file, FormatError, IntegrityError, what the store
        raises.
        """
        _, inode = self._regular(path)
        left = max(0, inode.size - offset)
        buffer = bytearray(left if size is None else min(left, size))
        self._read_into(inode, offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, path: AnyPath, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill `buffer` from `offset`, on several threads where it is large: decrypted straight into it.

        The number of bytes, fewer only at the end of the file. On failure all of `buffer` is wiped. Raises: as `read`.
        """
        _, inode = self._regular(path)
        return self._read_into(inode, offset, memoryview(buffer).cast("B"))

    def read_many(self, path: AnyPath, ranges: Sequence[Range]) -> None:
        """Fill many buffers (of bytes, each with its offset in the file) at once; each must lie inside the file.

        On failure all of them are wiped. Raises: as `read`, FormatError for a range that is not inside the file.
        """
        wanted, inode = self._regular(path)
        for offset, buffer in ranges:
            if offset < 0 or offset + len(buffer) > inode.size:
                raise FormatError(f"{printable(wanted)} has {inode.size} bytes; a range beyond its end was asked for")
        self._read_ranges(inode, ranges)

    def extract(self, directory: str | os.PathLike[str], progress: Progress | None = None) -> ExtractResult:
        """Write the whole tree to a directory that does not exist or is empty; nothing is left where that fails.

        Raises: ConflictError, StorageError, IntegrityError, what the store raises.
        """
        ahead = ReadAhead(self._here().volume)
        try:
            return extract_tree(self._tree, ahead, Path(directory), progress or NoProgress())
        finally:
            ahead.close()

    @property
    def closed(self) -> bool:
        """Whether nothing can be read any more."""
        return self._closed

    def close(self) -> bool:
        """End the threads that read; nothing can be read any more. False where this process has opened nothing.

        That is so after a fork: the parent's volume and threads are left alone.
        """
        self._closed = True
        if self._open.forks != _forks.count:
            return False
        self._open.parallel.close()
        return True

    # -- inside

    def _entries(self, top_path: bytes, top: Inode, recursive: bool) -> Iterator[Entry]:
        prefix = top_path + b"/" if top_path else b""
        if recursive:
            for below, inode in walk(self._tree, top):
                yield self._entry(prefix + below, inode)
            return
        for entry in self._tree.entries(top):
            if entry.name not in (b".", b".."):
                yield self._entry(prefix + entry.name, self._tree.inode(entry.nid))

    def _entry(self, path: bytes, inode: Inode) -> Entry:
        link = stat.S_ISLNK(inode.mode)
        return Entry(
            path=os.fsdecode(path),
            kind=inode.kind,
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            size=inode.size,
            links=inode.nlink,
            mtime_ns=inode.mtime_ns,
            target=os.fsdecode(self._tree.readlink(inode)) if link else None,
        )

    def _regular(self, path: AnyPath) -> tuple[bytes, Inode]:
        wanted = _clean(path)
        inode = self._tree.resolve(wanted)
        if not stat.S_ISREG(inode.mode):
            raise SourceError(f"{printable(wanted)} is a {inode.kind}, not a regular file")
        return wanted, inode

    def _read_into(self, inode: Inode, offset: int, buffer: memoryview) -> int:
        if offset < 0:
            raise ValueError("the offset of a read is not negative")
        size = max(0, min(len(buffer), inode.size - offset))
        try:
            self._read_ranges(inode, [(offset, buffer[:size])])
        except BaseException:
            buffer[:] = bytes(len(buffer))
            raise
        return size

    def _read_ranges(self, inode: Inode, ranges: Sequence[Range]) -> None:
        places: builtins.list[Range] = []
        for offset, buffer in ranges:
            start = 0
            for place, length in self._tree.extents(inode, offset, len(buffer)):
                part = buffer[start : start + length]
                if place is None:
                    part[:] = bytes(length)
                else:
                    places.append((place, part))
                start += length
        self._here().parallel.read_into(places)


class File(io.RawIOBase):
    """One regular file, open for reading. Not for use by several threads at once, since it has a position."""

    def __init__(self, files: Files, path: bytes, inode: Inode) -> None:
        self._files = files
        self._inode = inode
        self._position = 0
        self.name = os.fsdecode(path)
        self.size = inode.size
        self.mode = "rb"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        if whence not in bases:
            raise ValueError(f"whence {whence} is not known")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError("seek to before the file's beginning")
        self._position = position
        return position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]  # what the base class accepts is wider
        self._check_open()
        count = self._files._read_into(self._inode, self._position, memoryview(buffer).cast("B"))
        self._position += count
        return count

    def readall(self) -> bytes:
        self._check_open()
        buffer = bytearray(max(0, self.size - self._position))
        self.readinto(buffer)
        return bytes(buffer)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")


def _clean(path: AnyPath) -> bytes:
    return b"/".join(part for part in os.fsencode(path).split(b"/") if part not in (b"", b"."))
