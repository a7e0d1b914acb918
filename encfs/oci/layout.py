"""An OCI image layout directory (image-spec, image-layout.md) as a source and a sink of blobs.

Blobs are read with `pread` into private memory: a shared mapping of an untrusted file can change between the check and
the use. They are written to an unnamed file that gets its name when it is complete, so that a crash leaves nothing; the
index is replaced in one step. Not here: what the blobs mean (`encfs.format`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Buffer, Descriptor, RawManifest
from encfs.strictjson import loads_object

_LAYOUT_FILE = "oci-layout"
_INDEX_FILE = "index.json"
_BLOBS = "blobs/sha256"
_LAYOUT_VERSION = "1.0.0"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPES = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
_TAG_ANNOTATION = "org.opencontainers.image.ref.name"
_LISTED_TAGS = 8
#: A write this large is hashed in a thread of its own while it is being written.
_OVERLAP_SIZE = 256 << 10


class Layout:
    """One layout directory. Thread-safe for reading; every blob writer belongs to one thread at a time."""

    def __init__(
        self, path: str | os.PathLike[str], *, tag: str | None = None, digest: str | None = None, create: bool = False
    ) -> None:
        """`tag` or `digest` say what `manifest()` gives. With `create`, an absent or empty directory becomes one.

        Raises: NotFoundError, FormatError where it is no layout, ConflictError where other things lie there,
        StorageError.
        """
        self.path = Path(path)
        self._tag = tag
        self._digest = digest
        if create:
            self._create()
        try:
            self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{self.path}: {error.strerror}", hint="give the directory of an OCI layout") from None
        try:
            self._check_marker()
        except BaseException:
            os.close(self._root)
            raise

    def _check_marker(self) -> None:
        try:
            content = self._read_file(_LAYOUT_FILE, 4096)
        except NotFoundError:
            raise NotFoundError(f"{self.path} is no OCI layout: it has no {_LAYOUT_FILE} file") from None
        marker = loads_object(content, limit=4096, what=f"{self.path}/{_LAYOUT_FILE}")
        if marker.get("imageLayoutVersion") != _LAYOUT_VERSION:
            raise UnsupportedError(f"{self.path} is not an OCI layout of version {_LAYOUT_VERSION}")

    def _create(self) -> None:
        with _storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / _LAYOUT_FILE).exists():
                return
            if any(self.path.iterdir()):
                raise ConflictError(f"{self.path} is neither empty nor an OCI layout", hint="choose another directory")
            (self.path / _BLOBS).mkdir(parents=True)
            (self.path / _INDEX_FILE).write_bytes(_index_bytes({"schemaVersion": 2, "manifests": []}))
            (self.path / _LAYOUT_FILE).write_text(json.dumps({"imageLayoutVersion": _LAYOUT_VERSION}))

    # -- reading

    def manifest(self, reference: str | None = None) -> RawManifest:
        """The manifest of a tag or digest; None: what the reference named, or the only one of the layout.

        Raises: NotFoundError, UsageError where the choice is open, IntegrityError, FormatError.
        """
        entry = self._find(reference or self._digest or self._tag)
        content = self.read_blob(entry, limit=MAX_MANIFEST_SIZE)
        if entry.media_type == _INDEX_TYPE:
            raise UnsupportedError(
                f"{self.path}: {entry.digest} is an image index", hint="name one manifest by its digest"
            )
        return RawManifest(content, entry.digest, entry.media_type)

    def _find(self, reference: str | None) -> Descriptor:
        entries = [_parse_entry(item) for item in self._entries()]
        if reference is not None and reference.startswith("sha256:"):
            for entry in entries:
                if entry.digest == reference:
                    return entry
            # A manifest that no tag names any more is still addressed by its digest.
            size = self._stat_blob(reference).st_size
            return Descriptor("application/vnd.oci.image.manifest.v1+json", reference, size)
        if reference is not None:
            # Where a tag stands twice, the entry written last counts.
            for entry in reversed(entries):
                if entry.annotations.get(_TAG_ANNOTATION) == reference:
                    return entry
            raise NotFoundError(f"{self.path} has no tag {reference!r}", hint=self._tags_hint(entries))
        if len({entry.digest for entry in entries}) == 1:
            return entries[0]
        if not entries:
            raise NotFoundError(f"{self.path} is an empty OCI layout")
        raise UsageError(f"{self.path} holds several artifacts", hint=self._tags_hint(entries))

    @staticmethod
    def _tags_hint(entries: list[Descriptor]) -> str:
        tags = sorted({entry.annotations[_TAG_ANNOTATION] for entry in entries if _TAG_ANNOTATION in entry.annotations})
        if not tags:
            return "name a manifest by its digest, oci:PATH@sha256:…"
        shown = ", ".join(ascii(tag)[1:-1][:64] for tag in tags[:_LISTED_TAGS])
        return f"name one of its tags: {shown}{', …' if len(tags) > _LISTED_TAGS else ''}"

    def tags(self) -> list[str]:
        """All tags, sorted."""
        annotations = (_parse_entry(item).annotations for item in self._entries())
        return sorted({item[_TAG_ANNOTATION] for item in annotations if _TAG_ANNOTATION in item})

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """A small blob whole, verified. Raises: FormatError, IntegrityError, NotFoundError, StorageError."""
        if descriptor.size > limit:
            raise FormatError(f"blob {descriptor.digest} has {descriptor.size} bytes, more than the {limit} allowed")
        blob = self.open_blob(descriptor)
        try:
            content = bytearray(descriptor.size)
            if content:
                blob.read_into(0, memoryview(content))
        finally:
            blob.close()
        if sha256_digest(content) != descriptor.digest:
            raise IntegrityError(f"blob {descriptor.digest} in {self.path} has other content than its digest says")
        return bytes(content)

    def open_blob(self, descriptor: Descriptor) -> FileBlob:
        """Random access. Raises: NotFoundError, IntegrityError where the size differs, StorageError."""
        name = self._blob_name(descriptor.digest)
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._root)
        except FileNotFoundError:
            raise NotFoundError(
                f"{self.path} has no blob {descriptor.digest}", hint="copy the artifact again"
            ) from None
        except OSError as error:
            raise StorageError(f"{self.path}/{name}: {error.strerror}") from None
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size != descriptor.size:
            os.close(file)
            raise IntegrityError(
                f"blob {descriptor.digest} in {self.path} has {status.st_size} bytes, not {descriptor.size}"
            )
        return FileBlob(file, descriptor.size, f"{self.path}/{name}")

    def stream_blob(self, descriptor: Descriptor, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        """The whole blob in order; IntegrityError by the end at the latest."""
        blob = self.open_blob(descriptor)
        digest = hashlib.sha256()
        try:
            for offset in range(0, descriptor.size, chunk_size):
                chunk = bytearray(min(chunk_size, descriptor.size - offset))
                blob.read_into(offset, memoryview(chunk))
                digest.update(chunk)
                yield bytes(chunk)
        finally:
            blob.close()
        if digest.digest() != parse_digest(descriptor.digest):
            raise IntegrityError(f"blob {descriptor.digest} in {self.path} has other content than its digest says")

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether a blob of that digest and size lies here; its content is not looked at."""
        try:
            status = self._stat_blob(descriptor.digest)
        except NotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == descriptor.size

    def _stat_blob(self, digest: str) -> os.stat_result:
        try:
            return os.stat(self._blob_name(digest), dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            raise NotFoundError(f"{self.path} has no blob {digest}") from None

    @staticmethod
    def _blob_name(digest: str) -> str:
        return f"{_BLOBS}/{parse_digest(digest).hex()}"

    def _read_file(self, name: str, limit: int) -> bytes:
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._root)
        except FileNotFoundError:
            raise NotFoundError(f"{self.path} has no {name}") from None
        except OSError as error:
            raise StorageError(f"{self.path}/{name}: {error.strerror}") from None
        try:
            # Neither a directory nor a pipe, which might never end or give nothing.
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise FormatError(f"{self.path}/{name} is no regular file")
            with _storage_errors(self.path / name), os.fdopen(file, "rb", closefd=False) as stream:
                return stream.read(limit + 1)
        finally:
            os.close(file)

    def _index(self) -> dict[str, object]:
        content = self._read_file(_INDEX_FILE, MAX_MANIFEST_SIZE)
        return loads_object(content, limit=MAX_MANIFEST_SIZE, what=f"{self.path}/{_INDEX_FILE}")

    def _entries(self) -> list[object]:
        entries = self._index().get("manifests")
        if not isinstance(entries, list):
            raise FormatError(f"{self.path}/{_INDEX_FILE} has no list of manifests")
        return entries

    # -- writing

    def create_blob(self) -> FileBlobWriter:
        """A new blob. Raises: StorageError."""
        with _storage_errors(self.path):
            os.makedirs(self.path / _BLOBS, exist_ok=True)
            directory = os.open(_BLOBS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)
        try:
            return FileBlobWriter(directory, str(self.path))
        except BaseException:
            os.close(directory)
            raise

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        """A small blob in one call. Raises: StorageError."""
        writer = self.create_blob()
        try:
            writer.write(content)
            return writer.commit(media_type)
        finally:
            writer.abort()

    def remove_blob(self, descriptor: Descriptor) -> None:
        """Take back a blob that no manifest names yet."""
        with contextlib.suppress(FileNotFoundError), _storage_errors(self.path):
            os.unlink(self._blob_name(descriptor.digest), dir_fd=self._root)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """Write a manifest, then let the tag name it. Other tags stay. Raises: StorageError, FormatError."""
        blob = self.write_blob(content, media_type)
        entry: dict[str, object] = {"mediaType": media_type, "digest": blob.digest, "size": blob.size}
        if artifact_type:
            entry["artifactType"] = artifact_type
        if tag:
            entry["annotations"] = {_TAG_ANNOTATION: tag}
        with self._locked_index() as index:
            entries = index.setdefault("manifests", [])
            if not isinstance(entries, list):
                raise FormatError(f"{self.path}/{_INDEX_FILE} has no list of manifests")
            if tag:
                entries[:] = [item for item in entries if _parse_entry(item).annotations.get(_TAG_ANNOTATION) != tag]
            if entry not in entries:
                entries.append(entry)
        return blob

    def untag(self, tag: str) -> None:
        """Drop a tag; blobs stay. Raises: NotFoundError, StorageError."""
        with self._locked_index() as index:
            entries = index.get("manifests")
            kept = (
                [item for item in entries if _parse_entry(item).annotations.get(_TAG_ANNOTATION) != tag]
                if isinstance(entries, list)
                else []
            )
            if not isinstance(entries, list) or len(kept) == len(entries):
                raise NotFoundError(f"{self.path} has no tag {tag!r}")
            entries[:] = kept

    @contextlib.contextmanager
    def _locked_index(self) -> Iterator[dict[str, object]]:
        """The parsed index under a lock on the directory; written back whole if the block ends well."""
        fcntl.flock(self._root, fcntl.LOCK_EX)
        try:
            index = self._index()
            yield index
            with _storage_errors(self.path / _INDEX_FILE):
                temporary = f".{_INDEX_FILE}.{secrets.token_hex(6)}"
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                file = os.open(temporary, flags, 0o644, dir_fd=self._root)
                try:
                    with os.fdopen(file, "wb") as stream:
                        stream.write(_index_bytes(index))
                        stream.flush()
                        os.fsync(file)
                    os.rename(temporary, _INDEX_FILE, src_dir_fd=self._root, dst_dir_fd=self._root)
                except BaseException:
                    os.unlink(temporary, dir_fd=self._root)
                    raise
                os.fsync(self._root)
        finally:
            fcntl.flock(self._root, fcntl.LOCK_UN)

    def close(self) -> None:
        """Harmless when called again; blobs that were opened stay open."""
        if self._root >= 0:
            os.close(self._root)
            self._root = -1


class FileBlob:
    """Random access to a file by `pread`. Thread-safe."""

    def __init__(self, file: int, size: int, name: str) -> None:
        self._file = file
        self.size = size
        self._name = name
        self._can_tell = True

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises: IntegrityError where the file is shorter than it was, StorageError."""
        while buffer:
            try:
                size = os.preadv(self._file, [buffer], offset)
            except OSError as error:
                raise StorageError(f"{self._name}: {error.strerror}") from None
            if size == 0:
                raise IntegrityError(f"{self._name} is shorter than it claims")
            offset += size
            buffer = buffer[size:]

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Reads only what is in the page cache (preadv2's RWF_NOWAIT), where the filesystem can tell."""
        if self._can_tell:
            try:
                return os.preadv(self._file, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                    raise StorageError(f"{self._name}: {error.strerror}") from None
                self._can_tell = False
        self.read_into(offset, buffer)
        return True

    def discard(self, offset: int, size: int) -> bool:
        """There is no other copy than this one."""
        return False

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class FileBlobWriter:
    """One blob on its way into a layout, hashed while it is written."""

    def __init__(self, directory: int, name: str) -> None:
        """Takes over the descriptor of the blobs' directory. Raises: StorageError."""
        self._directory = directory
        self._name = name
        self._digest = hashlib.sha256()
        self._size = 0
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="digest")
        self._temporary: str | None = None
        with _storage_errors(name):
            self._file = self._open()

    def _open(self) -> int:
        """An unnamed file, which a crash takes with it; a named one where the filesystem has no such."""
        try:
            return os.open(f"/proc/self/fd/{self._directory}", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
        self._temporary = f".partial-{secrets.token_hex(8)}"
        return os.open(
            self._temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644, dir_fd=self._directory
        )

    def write(self, data: Buffer) -> None:
        """Raises: StorageError."""
        view = memoryview(data).cast("B")
        hashing: Future[None] | None = None
        if len(view) >= _OVERLAP_SIZE:
            hashing = self._hasher.submit(self._digest.update, view)
        else:
            self._digest.update(view)
        try:
            rest = view
            with _storage_errors(self._name):
                while rest:
                    rest = rest[os.write(self._file, rest) :]
        finally:
            if hashing is not None:
                hashing.result()
        self._size += len(view)

    def commit(self, media_type: str) -> Descriptor:
        """Make it durable and give it its name; an equal blob that is there already is kept. Raises: StorageError."""
        name = self._digest.hexdigest()
        with _storage_errors(self._name):
            os.fsync(self._file)
            try:
                if self._temporary is None:
                    source = f"/proc/self/fd/{self._file}"
                    os.link(source, name, dst_dir_fd=self._directory, follow_symlinks=True)
                else:
                    os.link(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileExistsError:
                self._replace_if_broken(name)
            os.fsync(self._directory)
        self.abort()
        return Descriptor(media_type, f"sha256:{name}", self._size)

    def _replace_if_broken(self, name: str) -> None:
        """A file of that name but another size is the rest of some accident: ours takes its place."""
        if os.stat(name, dir_fd=self._directory, follow_symlinks=False).st_size == self._size:
            return
        spare = f".partial-{secrets.token_hex(8)}"
        if self._temporary is None:
            os.link(f"/proc/self/fd/{self._file}", spare, dst_dir_fd=self._directory, follow_symlinks=True)
        else:
            os.link(self._temporary, spare, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        os.rename(spare, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def abort(self) -> None:
        """Throw away what has no name yet; harmless when called again."""
        if self._file < 0:
            return
        self._hasher.shutdown()
        os.close(self._file)
        if self._temporary is not None:
            os.unlink(self._temporary, dir_fd=self._directory)
        os.close(self._directory)
        self._file = self._directory = -1


def _parse_entry(value: object) -> Descriptor:
    """A descriptor of the untrusted index."""
    if not isinstance(value, dict):
        raise FormatError("an entry of the layout's index is not an object")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    annotations = value.get("annotations", {})
    if not isinstance(media_type, str) or not isinstance(annotations, dict):
        raise FormatError("an entry of the layout's index has no media type, or odd annotations")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise FormatError("an entry of the layout's index has no size")
    parse_digest(digest, "a digest of the layout's index")
    strings: Mapping[str, str] = {key: item for key, item in annotations.items() if isinstance(item, str)}
    return Descriptor(media_type, str(digest), size, annotations=strings)


def _index_bytes(index: Mapping[str, object]) -> bytes:
    return json.dumps(index, indent=2).encode()


@contextlib.contextmanager
def _storage_errors(path: object) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        raise StorageError(f"{path}: {error.strerror or error}", hint=hint) from None
