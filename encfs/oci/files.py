"""Blobs as local files: reading at random with a bounded number of open descriptors, and writing with the digest.

Files are read with `pread` into private memory, never mapped: a mapping of an untrusted file can change between the
check and the use. Not here: where the files lie (`layout`, `cache`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from encfs.encoding import parse_digest
from encfs.errors import IntegrityError, StorageError
from encfs.oci.blobs import Buffer, Descriptor

#: Descriptors that one pool keeps open; an artifact of 1 TB has a thousand segments, and a process often 1,024 files.
DEFAULT_OPEN_FILES = 128
#: Prefix of files that are being written, where the filesystem has no unnamed ones.
TEMPORARY_PREFIX = ".encfs-partial-"
#: Days for which an unfinished file waits to be resumed.
RESUMABLE_DAYS = 7

#: A write this large is hashed in a thread of its own while it is being written.
_OVERLAP_SIZE = 256 << 10
_REHASH_SIZE = 1 << 20
_RESUMABLE_LENGTH = 64  # hexadecimal digits of a digest


@contextlib.contextmanager
def storage_errors(path: object) -> Iterator[None]:
    """Turn every OSError of the block into a StorageError that names `path`."""
    try:
        yield
    except OSError as error:
        hint = "free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise StorageError(f"{path}: {error.strerror or error}", hint=hint) from None


class PooledFile:
    """A file that its pool opens when it is used and may close when it is not."""

    __slots__ = ("opener", "pool_state")

    def __init__(self, opener: Callable[[], int]) -> None:
        """`opener` gives a new descriptor; its errors go to whoever uses the file."""
        self.opener = opener
        self.pool_state: _Open | None = None


class _Open:
    """An open descriptor and the number of calls that are using it."""

    __slots__ = ("dropped", "file", "users")

    def __init__(self, file: int) -> None:
        self.file = file
        self.users = 1
        self.dropped = False


class FilePool:
    """Keeps the most recently used files open, at most `limit` besides those in use. Thread-safe."""

    def __init__(self, limit: int = DEFAULT_OPEN_FILES) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[PooledFile, None] = OrderedDict()

    def acquire(self, pooled: PooledFile) -> _Open:
        """A descriptor that stays open until `release`. Raises: what the opener raises."""
        with self._lock:
            state = pooled.pool_state
            if state is not None:
                state.users += 1
                self._open.move_to_end(pooled)
                return state
        file = pooled.opener()
        with self._lock:
            if pooled.pool_state is not None:  # another thread was faster
                os.close(file)
                pooled.pool_state.users += 1
                return pooled.pool_state
            state = pooled.pool_state = _Open(file)
            self._open[pooled] = None
            self._close_idle()
        return state

    def release(self, state: _Open) -> None:
        """Give back what `acquire` gave."""
        with self._lock:
            state.users -= 1
            if state.dropped and not state.users:
                os.close(state.file)

    def drop(self, pooled: PooledFile) -> None:
        """Close the file as soon as nobody uses it; the next `acquire` opens it anew."""
        with self._lock:
            self._drop(pooled)

    def close(self) -> None:
        """Close all files that are not in use, and the others when they are released."""
        with self._lock:
            for pooled in list(self._open):
                self._drop(pooled)

    def _drop(self, pooled: PooledFile) -> None:
        state = pooled.pool_state
        if state is None:
            return
        pooled.pool_state = None
        del self._open[pooled]
        state.dropped = True
        if not state.users:
            os.close(state.file)

    def _close_idle(self) -> None:
        excess = len(self._open) - self._limit
        if excess <= 0:
            return
        idle = [item for item in self._open if item.pool_state is not None and not item.pool_state.users]
        for pooled in idle[:excess]:
            self._drop(pooled)


class FileBlob:
    """Random access to a regular file, or a part of one, by `pread`. Thread-safe."""

    def __init__(self, pool: FilePool, opener: Callable[[], int], size: int, name: str, *, start: int = 0) -> None:
        """`opener` gives a descriptor of the checked file; `name` stands in messages; the blob begins at `start`."""
        self.size = size
        self._start = start
        self._pool = pool
        self._file = PooledFile(opener)
        self._name = name
        self._can_tell = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises: IntegrityError where the file is shorter than it claims, NotFoundError, StorageError."""
        state = self._pool.acquire(self._file)
        try:
            while buffer:
                try:
                    size = os.preadv(state.file, [buffer], self._start + offset)
                except OSError as error:
                    raise StorageError(f"{self._name}: {error.strerror}") from None
                if size == 0:
                    raise IntegrityError(f"{self._name} is shorter than it claims")
                offset += size
                buffer = buffer[size:]
        finally:
            self._pool.release(state)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Reads only what is in the page cache (preadv2's RWF_NOWAIT), where the filesystem can tell."""
        if self._can_tell:
            state = self._pool.acquire(self._file)
            try:
                return os.preadv(state.file, [buffer], self._start + offset, os.RWF_NOWAIT) == len(buffer)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise StorageError(f"{self._name}: {error.strerror}") from None
                self._can_tell = False
            finally:
                self._pool.release(state)
        self.read_into(offset, buffer)
        return True

    def discard(self, offset: int, size: int) -> bool:
        """There is no other copy than this one."""
        return False

    def close(self) -> None:
        """Harmless when called again."""
        self._pool.drop(self._file)


class FileWriter:
    """A file that is hashed while it is written, and gets its name only when it is complete.

    It is unnamed where the filesystem has such files (O_TMPFILE), so that a crash takes it along. With `resume` it has
    a temporary name that a later process finds again: `position` bytes are there already.
    """

    def __init__(self, directory: int, name: str, *, resume: Descriptor | None = None) -> None:
        """`directory` is a descriptor for temporary files, not taken over; `name` stands in messages.

        `resume` is the blob whose unfinished file to go on with. Raises: StorageError.
        """
        self._directory = directory
        self._name = name
        self._digest = hashlib.sha256()
        self._hasher: ThreadPoolExecutor | None = None
        self._temporary: str | None = None
        self._keep = False
        self.position = 0
        with storage_errors(name):
            self._file = self._open_resumable(resume) if resume is not None else self._open_new()

    def _open_new(self) -> int:
        try:
            return os.open(f"/proc/self/fd/{self._directory}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
        remove_stale(self._directory)
        self._temporary = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        file = os.open(self._temporary, flags, 0o644, dir_fd=self._directory)
        # The lock says that the writer lives. Nobody else can hold it: see `remove_stale` for the moment before.
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def _open_resumable(self, blob: Descriptor) -> int:
        """What lies there is nobody's word: its bytes count once the digest of the whole was compared."""
        name = f"{TEMPORARY_PREFIX}{parse_digest(blob.digest).hex()}"
        flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            file = os.open(name, flags, 0o644, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENXIO):
                raise
            return self._open_new()  # somebody else's, or no file: write one of our own
        try:
            ours = _is_private(os.fstat(file)) and _lock_named(file, name, self._directory)
            if ours:
                self._temporary = name
                self._keep = True
                self._hash_present(file, blob.size)
        except BaseException:
            os.close(file)
            raise
        if ours:
            return file
        os.close(file)  # another process is at it, perhaps
        return self._open_new()

    def _hash_present(self, file: int, limit: int) -> None:
        if os.fstat(file).st_size > limit:
            os.ftruncate(file, 0)  # no beginning of the blob
        # Nor may another one of the user's processes keep us here by making it longer.
        while self.position < limit and (content := os.read(file, min(_REHASH_SIZE, limit - self.position))):
            self._digest.update(content)
            self.position += len(content)

    def restart(self) -> None:
        """Throw away what is there and begin at 0. Raises: StorageError."""
        with storage_errors(self._name):
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self.position = 0

    def write(self, data: Buffer) -> None:
        """Append. Raises: StorageError."""
        view = memoryview(data).cast("B")
        hashing: Future[None] | None = None
        if len(view) >= _OVERLAP_SIZE:
            if self._hasher is None:
                self._hasher = ThreadPoolExecutor(1, thread_name_prefix="digest")
            hashing = self._hasher.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        try:
            rest = view
            with storage_errors(self._name):
                while rest:
                    rest = rest[os.write(self._file, rest) :]
        finally:
            if hashing is not None:
                hashing.result()
        self.position += len(view)

    def read_back(self, offset: int, size: int) -> bytes:
        """Bytes that were written, fewer only at the end. Raises: StorageError."""
        with storage_errors(self._name):
            return os.pread(self._file, size, offset)

    def hexdigest(self) -> str:
        """SHA-256 of everything written, in hexadecimal."""
        return self._digest.hexdigest()

    def publish(self, directory: int, name: str) -> None:
        """Make the file durable and give it `name` in `directory`; a file of that name and size is kept.

        Raises: StorageError.
        """
        with storage_errors(self._name):
            os.fsync(self._file)
            try:
                self._link(directory, name)
            except FileExistsError:
                if os.stat(name, dir_fd=directory, follow_symlinks=False).st_size != self.position:
                    # The rest of some accident: ours takes its place.
                    spare = f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
                    self._link(self._directory, spare)
                    os.rename(spare, name, src_dir_fd=self._directory, dst_dir_fd=directory)
            os.fsync(directory)
        self.discard()

    def _link(self, directory: int, name: str) -> None:
        if self._temporary is None:
            os.link(f"/proc/self/fd/{self._file}", name, dst_dir_fd=directory, follow_symlinks=True)
        else:
            os.link(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=directory)

    def discard(self) -> None:
        """Remove the temporary file, a resumable one too; harmless when called again."""
        self._keep = False
        self.close()

    def close(self) -> None:
        """End writing: an unfinished file that can be resumed stays, any other goes. Harmless when called again."""
        if self._file < 0:
            return
        if self._hasher is not None:
            self._hasher.shutdown()
        if self._temporary is not None and not self._keep:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
        os.close(self._file)
        self._file = -1


class FileBlobWriter:
    """A `BlobWriter` over a `FileWriter`: the committed file is named by its digest."""

    def __init__(self, temporary: int, directory: int, name: str) -> None:
        """Takes over two directories: of the unfinished and of the finished file. Raises: StorageError."""
        self._directories = (temporary, directory)
        self._writer = FileWriter(temporary, name)

    def write(self, data: Buffer) -> None:
        """Raises: StorageError."""
        self._writer.write(data)

    def digest(self) -> str:
        return f"sha256:{self._writer.hexdigest()}"

    def commit(self, media_type: str) -> Descriptor:
        """Make it durable and give it its name; an equal blob that is there already is kept. Raises: StorageError."""
        digest = self.digest()
        self._writer.publish(self._directories[1], digest.removeprefix("sha256:"))
        self.abort()
        return Descriptor(media_type, digest, self._writer.position)

    def abort(self) -> None:
        """Throw away what has no name yet; harmless when called again."""
        self._writer.discard()
        for directory in self._directories:
            os.close(directory)
        self._directories = ()  # type: ignore[assignment]


def remove_stale(directory: int) -> None:
    """Remove temporary files whose writers are gone; those that can be resumed only after `RESUMABLE_DAYS`."""
    oldest = time.time() - RESUMABLE_DAYS * 86400
    for name in os.listdir(directory):
        if not name.startswith(TEMPORARY_PREFIX):
            continue
        try:
            file = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        except OSError:
            continue  # gone, or not ours
        try:
            status = os.fstat(file)
            resumable = len(name) == len(TEMPORARY_PREFIX) + _RESUMABLE_LENGTH
            # An empty one may be another writer's that has not locked it yet.
            expired = status.st_mtime < oldest if resumable else status.st_size > 0
            if expired and _lock_named(file, name, directory):
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(file)


def _is_private(status: os.stat_result) -> bool:
    """Whether a file that was found is one to write to: no other user's, and not also some other file of ours."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_nlink == 1


def _lock_named(file: int, name: str, directory: int) -> bool:
    """Lock an open file; False where somebody else has it, or the name has come to mean another file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except (BlockingIOError, FileNotFoundError):
        return False
    return os.path.samestat(named, os.fstat(file))
