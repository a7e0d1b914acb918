"""Ciphertext on disk: what was fetched from registries, shared by all processes of one user (docs/registries.md).

Nothing in it is trusted: whoever reads checks what comes back as if the registry had sent it, and drops what is wrong.
Therefore nothing is synchronised to disk either: after a power failure, wrong bytes are found and fetched again.

Documents and tags are kept here as they are; of blobs, the directory holds parts, whose inside `cachedblob` knows. Not
here: what is fetched, and when (`prefetch`); which source uses the cache (`cached`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import random
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import EncfsError, StorageError
from encfs.oci.files import FilePool
from encfs.strictjson import loads_object

log = logging.getLogger(__name__)

#: Bytes whose presence is recorded together.
GRAIN = 4096

_VERSION = "v1"
_BLOBS, _DOCUMENTS, _TAGS = "blobs", "documents", "tags"
_NEW_PREFIX = ".new-"
#: Seconds after which an unfinished file is nobody's any more.
_STALE_SECONDS = 3600.0
#: Of files that are being evicted, before anything is taken from them.
_EVICTED_MODE = 0o400
#: Documents are small and nothing works without them: they count as used this much later than they were (seconds).
_DOCUMENT_BONUS = 7 * 86400.0
#: Seconds without writing after a write failed.
_PAUSE_SECONDS = 60.0
_MAX_TAG_RECORD = 4096
#: Files in the cache at most; eviction looks at every one.
_MAX_FILES = 1 << 16
_LARGEST_QUANTUM = 256 << 20


def open_cache(directory: str, size: int) -> Cache:
    """The cache in a directory, created with mode 0700 if need be, of at most `size` bytes of disk space.

    Raises: StorageError where the directory cannot be used, or another user could have prepared it.
    """
    try:
        os.makedirs(os.path.dirname(os.path.abspath(directory)), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        top = _open_directory(directory, None, directory)
        try:
            root = _open_subdirectory(top, _VERSION, directory)
        finally:
            os.close(top)
        try:
            return Cache(directory, root, size)
        except BaseException:
            os.close(root)
            raise
    except OSError as error:
        raise _unfit(directory, error.strerror or str(error)) from None


def _open_directory(name: str, parent: int | None, shown: str) -> int:
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _unfit(shown, "it is a link or no directory") from None
        raise
    status = os.fstat(directory)
    problem = ""
    if status.st_uid != os.geteuid():
        problem = f"it belongs to another user (uid {status.st_uid})"
    elif status.st_mode & 0o077:
        problem = "other users may enter it: its mode must be 700"
    if problem:
        os.close(directory)
        raise _unfit(shown, problem)
    return directory


def _open_subdirectory(parent: int, name: str, shown: str) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    return _open_directory(name, parent, f"{shown}/{name}")


def _unfit(directory: str, problem: str) -> StorageError:
    return StorageError(
        f"the cache directory {directory} cannot be used: {problem}", hint="name another one with --cache-dir"
    )


def is_evicted(status: os.stat_result) -> bool:
    """Whether an open part is being evicted, or was: nothing in it counts any more."""
    return not status.st_mode & stat.S_IWUSR


@dataclass(frozen=True, slots=True)
class Tag:
    """What a tag meant when the registry was last reached."""

    reference: str
    digest: str


class Cache:
    """One cache directory. Thread-safe. Failures of the disk are logged once and otherwise look like an empty cache."""

    def __init__(self, directory: str, root: int, size: int) -> None:
        """`root` is a descriptor of the versioned directory, taken over once this returns. Use `open_cache`."""
        self.directory = directory
        self.size = size
        self.files = FilePool()
        self._root = root
        self._folders: dict[str, int] = {}
        try:
            for name in (_BLOBS, _DOCUMENTS, _TAGS):
                self._folders[name] = _open_subdirectory(root, name, f"{directory}/{_VERSION}")
        except BaseException:
            for folder in self._folders.values():
                os.close(folder)
            raise
        self._quantum = max(GRAIN, min(size // 32, _LARGEST_QUANTUM))
        #: Bytes written since the directory was last looked through.
        self._written = 0
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._paused_until = 0.0

    @property
    def room(self) -> int:
        """Bytes that are kept for certain, if nobody else uses the cache."""
        return self.size - max(self.size // 8, 2 * self._quantum)

    # -- parts of blobs

    def open_part(self, name: str, size: int) -> int:
        """A descriptor of a part of the given file size. Raises: OSError; FileNotFoundError where there is none."""
        folder = self._folders[_BLOBS]
        try:
            file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES):
                raise
        else:
            status = os.fstat(file)
            fits = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_size == size
            if fits and not is_evicted(status):
                return file
            os.close(file)
            if not status.st_nlink:
                # Evicted just now; what has the name since then is another.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        log.warning("%s: %s is none of the cache's files: removed", self.directory, name)
        self._remove_stray(folder, name)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def create_part(self, name: str, size: int) -> None:
        """An empty part, if there is none. Raises: OSError."""
        folder = self._folders[_BLOBS]
        with self._new_file(folder) as (file, temporary):
            os.ftruncate(file, size)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)

    def remove_part(self, name: str) -> None:
        """Raises: OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._folders[_BLOBS])

    @contextlib.contextmanager
    def _new_file(self, folder: int) -> Iterator[tuple[int, str]]:
        """A new file and its temporary name, which is gone at the end."""
        name = f"{_NEW_PREFIX}{secrets.token_hex(8)}"
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            yield file, name
        finally:
            os.close(file)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)

    # -- documents: small blobs kept whole

    def read_document(self, digest: str, limit: int) -> bytes | None:
        """A small blob of at most `limit` bytes, its digest checked; None where it is not there.

        Raises: FormatError.
        """
        name = parse_digest(digest).hex()
        content = self._read_small(_DOCUMENTS, name, limit)
        if content is None or sha256_digest(content) == digest:
            return content
        log.warning("%s: the document %s is damaged: removed", self.directory, digest)
        self._remove_small(_DOCUMENTS, name)
        return None

    def write_document(self, content: bytes) -> None:
        """Keep a small blob, if the disk lets us."""
        self._write_small(_DOCUMENTS, hashlib.sha256(content).hexdigest(), content)

    def read_tag(self, reference: str) -> Tag | None:
        """What a reference with a tag meant the last time. Untrusted, as everything here."""
        content = self._read_small(_TAGS, _tag_name(reference), _MAX_TAG_RECORD)
        if content is None:
            return None
        try:
            document = loads_object(content, limit=_MAX_TAG_RECORD, what="tag record")
            digest = document.get("digest")
            parse_digest(digest)
        except EncfsError:
            return None
        return Tag(reference, str(digest)) if document.get("reference") == reference else None

    def write_tag(self, tag: Tag) -> None:
        """Keep what a tag means now."""
        content = json.dumps({"digest": tag.digest, "reference": tag.reference}).encode()
        self._write_small(_TAGS, _tag_name(tag.reference), content)

    def _read_small(self, kind: str, name: str, limit: int) -> bytes | None:
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folders[kind])
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                self._remove_small(kind, name)
            else:
                self.failed("read", error)
            return None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
                return None
            with contextlib.suppress(OSError):
                os.utime(file)
            content = b""
            while len(content) < status.st_size and (piece := os.read(file, status.st_size - len(content))):
                content += piece
        except OSError as error:
            self.failed("read", error)
            return None
        finally:
            os.close(file)
        return content if len(content) == status.st_size else None

    def _write_small(self, kind: str, name: str, content: bytes) -> None:
        if not self.writable:
            return
        folder = self._folders[kind]
        try:
            with self._new_file(folder) as (file, temporary):
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            self.failed("written", error)
            return
        self.wrote(max(GRAIN, len(content)))

    def _remove_small(self, kind: str, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folders[kind])

    # -- failures of the disk

    @property
    def writable(self) -> bool:
        """False for a while after a write failed."""
        return time.monotonic() >= self._paused_until

    def failed(self, verb: str, error: OSError) -> None:
        """Note that the cache could not be read or written; said once."""
        if verb == "written":
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
        with self._lock:
            if verb in self._said:
                return
            self._said.add(verb)
        log.warning(
            "the cache in %s cannot be %s: %s; going on without it", self.directory, verb, error.strerror or error
        )

    # -- size

    def wrote(self, size: int) -> None:
        """Count bytes written; now and then, that makes room."""
        with self._lock:
            self._written += size
            if self._written < self._quantum:
                return
            self._written = 0
        self.evict()

    def evict(self) -> None:
        """Remove what was not used for longest where the cache is too large, or nearly so. One process does it."""
        try:
            with self._eviction_lock() as locked:
                if locked:
                    self._evict()
        except OSError as error:
            self.failed("tidied", error)

    @contextlib.contextmanager
    def _eviction_lock(self) -> Iterator[bool]:
        # A descriptor of its own: the lock also holds against other threads.
        file = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(file)

    def _evict(self) -> None:
        found = self._scan()
        total, count = sum(item.allocated for item in found), len(found)
        # Two processes may write a quantum each before one of them looks again.
        if total <= self.size - 2 * self._quantum and count <= _MAX_FILES:
            return
        found.sort(key=lambda item: item.used)
        for item in found:
            if total <= self.size - self.size // 8 and count <= _MAX_FILES - _MAX_FILES // 8:
                break
            self._remove(item)
            total -= item.allocated
            count -= 1

    def _remove(self, item: _File) -> None:
        """Take a file away and free its space, though processes may have it open: they then find nothing in it."""
        folder = self._folders[item.kind]
        try:
            file = os.open(item.name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return
        except PermissionError:
            # Taken by an eviction that was cut short: it must not stop every later one.
            self._remove_stray(folder, item.name)
            return
        try:
            os.fchmod(file, _EVICTED_MODE)
            os.unlink(item.name, dir_fd=folder)
            os.ftruncate(file, 0)
        finally:
            os.close(file)

    def _scan(self) -> list[_File]:
        found = []
        oldest = time.time() - _STALE_SECONDS
        for kind, folder in self._folders.items():
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    unfinished = entry.name.startswith(_NEW_PREFIX)
                    if (unfinished and status.st_mtime < oldest) or not stat.S_ISREG(status.st_mode):
                        self._remove_stray(folder, entry.name)
                    if unfinished or not stat.S_ISREG(status.st_mode):
                        continue  # what is being written has no name to be evicted by
                    used = status.st_mtime + (0.0 if kind == _BLOBS else _DOCUMENT_BONUS)
                    found.append(_File(kind, entry.name, status.st_blocks * 512, used))
        return found

    def _remove_stray(self, folder: int, name: str) -> None:
        # Only root can have put it there: nobody else can enter. A full directory stays, and costs one part.
        with contextlib.suppress(OSError):
            try:
                os.unlink(name, dir_fd=folder)
            except IsADirectoryError:
                os.rmdir(name, dir_fd=folder)

    def close(self) -> None:
        """Make room for what was written, and close all files. Harmless when called again."""
        if self._root < 0:
            return
        # What many short processes write counts as well: each of them looks with the chance of its share.
        if random.random() * self._quantum < self._written:  # noqa: S311 - no secret
            self.evict()
        self.files.close()
        closing = (*self._folders.values(), self._root)
        # Before they are closed: a thread that still fetches must not meet another's file under the same number.
        self._folders = dict.fromkeys(self._folders, -1)
        self._root = -1
        for folder in closing:
            os.close(folder)


@dataclass(frozen=True, slots=True)
class _File:
    """One file of the cache: bytes on disk, and when it was last used (seconds since the epoch)."""

    kind: str
    name: str
    allocated: int
    used: float


def _tag_name(reference: str) -> str:
    return hashlib.sha256(reference.encode()).hexdigest()
