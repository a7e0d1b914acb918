"""A directory or a single file as a source: every entry in sorted order, contents read once, holes kept.

One pass, and the same order every time, so that the same tree gives the same image. A file that changes while it is
read is refused. Not here: writing the image (`encfs.erofs.writer`) and sealing it (`encfs.format.writer`).
"""

from __future__ import annotations

import errno
import fnmatch
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from encfs.erofs.structures import printable
from encfs.erofs.writer import Entry, ErofsWriter
from encfs.errors import NotFoundError, SourceError

#: Called with the bytes of plaintext that were read since the last call.
Advance = Callable[[int], None]

_ROOT_MODE = stat.S_IFDIR | 0o755
#: Files at least this large are announced to the kernel as read from front to back.
_LARGE_FILE = 1 << 20
_NO_SUCH_PATH = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP})


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """`exclude` are shell patterns (fnmatch) on the path below the source or on a single name; a directory that fits
    is left out with everything in it. Modification times after `latest_mtime` (seconds) are set to it."""

    exclude: tuple[str, ...] = ()
    latest_mtime: int | None = None


def add_source(source: Path, writer: ErofsWriter, options: SourceOptions, advance: Advance) -> None:
    """Add a directory's entries, or a single file under its own name, to an image.

    Raises: NotFoundError, SourceError naming the path; what the writer's sink raises.
    """
    status = _stat_source(source)
    adder = _Adder(writer, options, advance)
    if stat.S_ISDIR(status.st_mode):
        adder.add_tree(os.fsencode(source))
    elif stat.S_ISREG(status.st_mode):
        adder.add_single_file(os.fsencode(source), status)
    else:
        raise SourceError(f"{source} is neither a directory nor a regular file")


@dataclass(frozen=True, slots=True)
class SourceMeasure:
    """Regular files of a source and their bytes: hard links once, holes not counted."""

    files: int
    size: int


def measure_source(source: Path, options: SourceOptions) -> SourceMeasure:
    """What a source holds, without reading it.

    Raises: NotFoundError, SourceError naming the path.
    """
    top = _stat_source(source)
    if not stat.S_ISDIR(top.st_mode):
        return SourceMeasure(1, _allocated(top))
    files = total = 0
    linked: set[tuple[int, int]] = set()
    for _, status in _walk(os.fsencode(source), options.exclude):
        if stat.S_ISREG(status.st_mode):
            identity = (status.st_dev, status.st_ino)
            if status.st_nlink == 1 or identity not in linked:
                files += 1
                total += _allocated(status)
            if status.st_nlink > 1:
                linked.add(identity)
    return SourceMeasure(files, total)


def _stat_source(source: Path) -> os.stat_result:
    try:
        return os.stat(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, OSError) and error.errno not in _NO_SUCH_PATH:
            raise _unreadable(os.fsencode(source), error) from None
        reason = error.strerror if isinstance(error, OSError) else "no valid path"
        shown = printable(os.fsencode(source))
        raise NotFoundError(f"{shown}: {reason}", hint="give an existing directory or file") from None


def _allocated(status: os.stat_result) -> int:
    return min(status.st_size, status.st_blocks * 512)


def _walk(root: bytes, exclude: Sequence[str]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Every path below `root` with its lstat, parents first, names sorted bytewise; one directory's names in memory."""
    pending: list[Iterator[bytes]] = [iter([b""])]
    while pending:
        path = next(pending[-1], None)
        if path is None:
            pending.pop()
            continue
        full = root + b"/" + path if path else root
        try:
            status = os.lstat(full) if path else os.stat(full)
            if stat.S_ISDIR(status.st_mode):
                prefix = path + b"/" if path else b""
                children = (prefix + name for name in sorted(os.listdir(full)))
                pending.append(iter([child for child in children if not _excluded(child, exclude)]))
        except OSError as error:
            raise _unreadable(full, error) from None
        yield path, status


def _excluded(path: bytes, patterns: Sequence[str]) -> bool:
    if not patterns:
        return False
    text = os.fsdecode(path)
    name = text.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(text, item) or fnmatch.fnmatchcase(name, item) for item in patterns)


class _Adder:
    """One source being added. Remembers the first path of every inode that has several names."""

    def __init__(self, writer: ErofsWriter, options: SourceOptions, advance: Advance) -> None:
        self._writer = writer
        self._options = options
        self._advance = advance
        self._linked: dict[tuple[int, int], bytes] = {}

    def add_tree(self, root: bytes) -> None:
        for path, status in _walk(root, self._options.exclude):
            self._add(root + b"/" + path if path else root, path, status)

    def add_single_file(self, full: bytes, status: os.stat_result) -> None:
        mtime = self._mtime(status)
        self._writer.add(Entry(b"", _ROOT_MODE, uid=status.st_uid, gid=status.st_gid, mtime_ns=mtime))
        # A link to the file (model caches are full of them) stands for the file, under the link's name.
        self._add(os.path.realpath(full), os.path.basename(full), status)

    def _mtime(self, status: os.stat_result) -> int:
        latest = self._options.latest_mtime
        return status.st_mtime_ns if latest is None else min(status.st_mtime_ns, latest * 1_000_000_000)

    def _add(self, full: bytes, path: bytes, status: os.stat_result) -> None:
        mode = status.st_mode
        if status.st_nlink > 1 and not stat.S_ISDIR(mode):
            first = self._linked.setdefault((status.st_dev, status.st_ino), path)
            if first is not path:
                self._writer.add(Entry(path, mode, link_to=first))
                return
        try:
            entry = Entry(
                path,
                mode,
                uid=status.st_uid,
                gid=status.st_gid,
                mtime_ns=self._mtime(status),
                size=status.st_size if stat.S_ISREG(mode) else 0,
                rdev=status.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0,
                target=os.readlink(full) if stat.S_ISLNK(mode) else b"",
                xattrs=_read_xattrs(full, follow=not path),
            )
            if stat.S_ISREG(mode) and entry.size:
                self._add_file(full, entry, status)
            else:
                self._writer.add(entry)
        except OSError as error:
            raise _unreadable(full, error) from None

    def _add_file(self, full: bytes, entry: Entry, status: os.stat_result) -> None:
        # O_NONBLOCK: should it have become a pipe by now, nobody waits for a writer.
        descriptor = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_unchanged(full, status, os.fstat(descriptor))
            if entry.size >= _LARGE_FILE:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            extents = _data_extents(descriptor, status)
            self._writer.add(entry, _ExtentReader(full, descriptor, extents, self._advance), extents)
            _check_unchanged(full, status, os.fstat(descriptor))
        finally:
            os.close(descriptor)


class _ExtentReader:
    """The bytes of a file's data extents, one after the other (`encfs.erofs.writer.DataSource`)."""

    def __init__(self, full: bytes, descriptor: int, extents: Sequence[tuple[int, int]], advance: Advance) -> None:
        self._full = full
        self._descriptor = descriptor
        self._extents = iter(extents)
        self._offset = self._left = 0
        self._advance = advance

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._left:
            extent = next(self._extents, None)
            if extent is None:
                return 0
            self._offset, self._left = extent
        size = os.preadv(self._descriptor, [buffer[: self._left]], self._offset)
        if size == 0:
            raise _changed(self._full)
        self._offset += size
        self._left -= size
        self._advance(size)
        return size


def _data_extents(descriptor: int, status: os.stat_result) -> list[tuple[int, int]]:
    """(offset, length) of what is not a hole; the whole file where the filesystem cannot tell."""
    if status.st_blocks * 512 >= status.st_size:
        return [(0, status.st_size)]
    extents: list[tuple[int, int]] = []
    position = 0
    while position < status.st_size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                break
            return [(0, status.st_size)]
        if start >= status.st_size:
            break
        position = min(os.lseek(descriptor, start, os.SEEK_HOLE), status.st_size)
        extents.append((start, position - start))
    return extents


def _read_xattrs(full: bytes, *, follow: bool) -> tuple[tuple[bytes, bytes], ...]:
    try:
        names = os.listxattr(full, follow_symlinks=follow)
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS):
            return ()
        raise
    return tuple((os.fsencode(name), os.getxattr(full, name, follow_symlinks=follow)) for name in sorted(names))


def _check_unchanged(full: bytes, before: os.stat_result, now: os.stat_result) -> None:
    def state(status: os.stat_result) -> tuple[int, ...]:
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    if state(before) != state(now):
        raise _changed(full)


def _changed(full: bytes) -> SourceError:
    return SourceError(f"{printable(full)} changed while it was being read", hint="try again when nothing writes to it")


def _unreadable(full: bytes, error: OSError) -> SourceError:
    hint = "run as a user who may read it, or leave it out with --exclude" if error.errno == errno.EACCES else None
    return SourceError(f"{printable(full)}: {error.strerror}", hint=hint)
