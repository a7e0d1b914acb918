"""The directory of an OCI image layout: its marker, making one, and taking one back that nothing came into.

Whoever makes layouts holds a shared lock on the marker while at work, so that nobody's empty layout is removed under
somebody else who is about to fill it. Not here: the index (`layoutindex`), blobs (`layout`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from pathlib import Path

from encfs.errors import ConflictError, EncfsError, FormatError, NotFoundError, StorageError, UnsupportedError
from encfs.oci.files import storage_errors
from encfs.strictjson import loads_object

BLOBS = "blobs/sha256"
INDEX_FILE = "index.json"
LAYOUT_FILE = "oci-layout"
_LAYOUT_VERSION = "1.0.0"
MAX_MARKER = 4096
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


def lock(file: int, kind: int, path: Path) -> None:
    """flock(2) within a bounded time. Raises: ConflictError, StorageError."""
    deadline = time.monotonic() + LOCK_SECONDS
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
    """A descriptor of the directory. Raises: NotFoundError, FormatError, UnsupportedError where it is no layout."""
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}", hint="give the directory of an OCI layout") from None
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
            try:
                self._make_files()
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
                marker = os.open(self._path / LAYOUT_FILE, flags)
            except FileNotFoundError:
                continue
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
        self._path.mkdir(parents=True, exist_ok=True)
        if (self._path / LAYOUT_FILE).exists():
            return
        # What a creation that was cut short may have left is taken over; the marker comes last.
        if {item.name for item in self._path.iterdir()} - {BLOBS.split("/")[0], INDEX_FILE}:
            raise ConflictError(f"{self._path} is neither empty nor an OCI layout", hint="choose another directory")
        (self._path / BLOBS).mkdir(parents=True, exist_ok=True)
        # Another process may be creating the same layout, and may have filled it already.
        with contextlib.suppress(FileExistsError), open(self._path / INDEX_FILE, "xb") as file:
            file.write(_EMPTY_INDEX)
        with contextlib.suppress(FileExistsError), open(self._path / LAYOUT_FILE, "xb") as file:
            file.write(json.dumps({"imageLayoutVersion": _LAYOUT_VERSION}).encode())
            self._is_ours = True

    def close(self) -> None:
        """Where this made the layout and nothing has come into it, leave what was there before. Harmless again."""
        if self._marker < 0:
            return
        # That a layout stays which nobody needs is no reason to fail for who has failed already, or wrote nothing.
        with contextlib.suppress(OSError, EncfsError):
            if self._is_ours and self._is_unused():
                self._take_back()
        os.close(self._marker)
        self._marker = -1

    def _is_unused(self) -> bool:
        """Whether nobody else is writing and there is nothing in it, unfinished blobs neither; locked if so."""
        try:
            fcntl.flock(self._marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        names = {item.name for item in self._path.iterdir()}
        return (
            names <= {BLOBS.split("/")[0], INDEX_FILE, LAYOUT_FILE}
            and (self._path / INDEX_FILE).read_bytes() == _EMPTY_INDEX
            and not any((self._path / BLOBS).iterdir())
        )

    def _take_back(self) -> None:
        (self._path / BLOBS).rmdir()
        (self._path / BLOBS).parent.rmdir()
        (self._path / INDEX_FILE).unlink()
        # From here on somebody else may make the layout again: only empty directories are removed any more.
        (self._path / LAYOUT_FILE).unlink()
        for directory in self._missing:
            directory.rmdir()
