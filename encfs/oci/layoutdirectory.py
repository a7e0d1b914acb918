"""The directory of an OCI image layout: its marker, making one, and taking one back that nothing came into.

Whoever makes layouts holds a shared lock on the marker while at work, so that nobody's empty layout is removed under
somebody else who is about to fill it. Not here: the index (`layoutindex`), blobs (`layout`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from encfs.errors import ConflictError, EncfsError, FormatError, NotFoundError, StorageError, UnsupportedError
from encfs.oci.files import TEMPORARY_PREFIX, storage_errors
from encfs.strictjson import loads_object

BLOBS = "blobs/sha256"
INDEX_FILE = "index.json"
LAYOUT_FILE = "oci-layout"
_BLOBS_PARENT = "blobs"
_LAYOUT_VERSION = "1.0.0"
MAX_MARKER = 4096
_MARKER = json.dumps({"imageLayoutVersion": _LAYOUT_VERSION}).encode()
_EMPTY_INDEX = json.dumps({"schemaVersion": 2, "manifests": []}, indent=2).encode()
#: How long to wait for another process that holds a lock (seconds); it does so for milliseconds.
LOCK_SECONDS = 30.0
#: How often a directory is made again that somebody else is just taking back.
_ATTEMPTS = 100


def read_file(root: int, path: Path, name: str, limit: int) -> bytes:
    """A small file of the layout whose directory is `root`; up to one byte more than `limit`.

    Raises: NotFoundError, FormatError where it is no regular file, StorageError.
    """
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root)
    except FileNotFoundError:
        raise NotFoundError(f"{path} has no {name}") from None
    except OSError as error:
        raise StorageError(f"{path}/{name}: {error.strerror}") from None
    try:
        # Neither a directory nor a pipe, which might never end or give nothing.
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FormatError(f"{path}/{name} is no regular file")
        with storage_errors(path / name), os.fdopen(file, "rb", closefd=False) as stream:
            return stream.read(limit + 1)
    finally:
        os.close(file)


def lock(file: int, kind: int, path: Path, seconds: float = LOCK_SECONDS) -> None:
    """flock(2) within a bounded time. Raises: ConflictError, StorageError."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConflictError(
                    f"{path} is locked by another process", hint="try again when that is done"
                ) from None
            time.sleep(0.02)
        except OSError as error:
            raise StorageError(f"{path} cannot be locked: {error.strerror}") from None
        else:
            return


def open_layout(path: Path) -> int:
    """A descriptor of the directory.

    Raises: NotFoundError, FormatError, UnsupportedError where it is no layout; StorageError where it cannot be told.
    """
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{path}: {error.strerror}", hint="give the directory of an OCI layout") from None
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}") from None
    try:
        _check_marker(root, path)
    except BaseException:
        os.close(root)
        raise
    return root


def _check_marker(root: int, path: Path) -> None:
    try:
        content = read_file(root, path, LAYOUT_FILE, MAX_MARKER)
    except NotFoundError:
        raise NotFoundError(f"{path} is no OCI layout: it has no {LAYOUT_FILE} file") from None
    check_marker(content, path)


def check_marker(content: bytes, where: object) -> None:
    """Raises: FormatError, UnsupportedError for another version than ours."""
    marker = loads_object(content, limit=MAX_MARKER, what=f"{where}/{LAYOUT_FILE}")
    if marker.get("imageLayoutVersion") != _LAYOUT_VERSION:
        raise UnsupportedError(f"{where} is not an OCI layout of version {_LAYOUT_VERSION}")


class LayoutMaker:
    """A layout to write to: an absent or empty directory becomes one. Close it when the writing is done."""

    def __init__(self, path: Path) -> None:
        """Raises: ConflictError where other things lie there, StorageError."""
        self._path = path
        self._is_ours = False
        with storage_errors(path):
            #: Directories that were not there before, innermost first.
            self._missing = [one for one in (path, *path.parents) if not one.exists()]
            self._marker = self._make()

    def _make(self) -> int:
        for _ in range(_ATTEMPTS):
            # What is gone again is being taken back by somebody else.
            with contextlib.suppress(FileNotFoundError):
                _make_directory(self._path)
                self._make_files()
                marker = os.open(self._path / LAYOUT_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
                try:
                    lock(marker, fcntl.LOCK_SH, self._path)
                    if os.fstat(marker).st_nlink:
                        return marker
                except BaseException:
                    os.close(marker)
                    raise
                os.close(marker)
        raise StorageError(f"{self._path} is being removed by somebody else again and again", hint="try again later")

    def _make_files(self) -> None:
        if (self._path / LAYOUT_FILE).exists():
            return
        with self._open_locked(LOCK_SECONDS) as directory:
            present = set(os.listdir(directory))
            if LAYOUT_FILE in present:
                return  # another process was faster
            # What a creation that was cut short may have left is taken over; the marker comes last.
            foreign = present - {_BLOBS_PARENT, INDEX_FILE}
            if any(not name.startswith(TEMPORARY_PREFIX) for name in foreign):
                raise ConflictError(f"{self._path} is neither empty nor an OCI layout", hint="choose another directory")
            for name in (_BLOBS_PARENT, BLOBS):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, dir_fd=directory)
            _create(directory, INDEX_FILE, _EMPTY_INDEX)
            self._is_ours = _create(directory, LAYOUT_FILE, _MARKER)

    @contextlib.contextmanager
    def _open_locked(self, seconds: float) -> Iterator[int]:
        """The directory's descriptor, alone among those who make the layout, or take it back."""
        directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            lock(directory, fcntl.LOCK_EX, self._path, seconds)
            yield directory
        finally:
            os.close(directory)

    def close(self) -> None:
        """Where this made the layout and nothing has come into it, leave what was there before. Harmless again."""
        if self._marker < 0:
            return
        # That a layout stays which nobody needs is no reason to fail for who has failed already, or wrote nothing.
        with contextlib.suppress(OSError, EncfsError):
            if self._is_ours:
                self._take_back()
        os.close(self._marker)
        self._marker = -1

    def _take_back(self) -> None:
        """Raises: ConflictError where somebody else is writing, or about to."""
        lock(self._marker, fcntl.LOCK_EX, self._path, seconds=0)
        with self._open_locked(seconds=0):
            if not self._is_unused():
                return
            (self._path / BLOBS).rmdir()
            (self._path / BLOBS).parent.rmdir()
            (self._path / INDEX_FILE).unlink()
            (self._path / LAYOUT_FILE).unlink()
            for directory in self._missing:
                directory.rmdir()

    def _is_unused(self) -> bool:
        """Whether there is nothing in it, unfinished blobs neither."""
        names = {item.name for item in self._path.iterdir()}
        return (
            names <= {_BLOBS_PARENT, INDEX_FILE, LAYOUT_FILE}
            and (self._path / INDEX_FILE).read_bytes() == _EMPTY_INDEX
            and not any((self._path / BLOBS).iterdir())
        )


def _make_directory(path: Path) -> None:
    """With those above it, where they are missing. Raises: FileNotFoundError where one is gone again, OSError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        # pathlib looks only afterwards whether it is a directory, and takes one that is gone by then for another thing.
        if os.path.islink(error.filename) or not stat.S_ISDIR(os.stat(error.filename).st_mode):
            raise


def _create(directory: int, name: str, content: bytes) -> bool:
    """A file that appears with all its content, whoever looks and whatever happens; False where there is one.

    Raises: OSError.
    """
    temporary = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(file)
        os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
    return True
