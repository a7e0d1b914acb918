"""An OCI image layout directory (image-spec, image-layout.md) as a source and a sink of blobs.

A blob gets its name when it is complete, and the index is replaced in one step, so that a crash leaves no half of
anything. Not here: reading and writing the files themselves (`files`), what the blobs mean (`encfs.format`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor, RawManifest
from encfs.oci.files import FileBlob, FileBlobWriter, FilePool, FileWriter, remove_stale, storage_errors
from encfs.oci.reference import check_layout_tag
from encfs.strictjson import loads_object

_LAYOUT_FILE = "oci-layout"
_INDEX_FILE = "index.json"
_NEW_INDEX_FILE = ".encfs-index.json"
_BLOBS = "blobs/sha256"
_LAYOUT_VERSION = "1.0.0"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPES = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
_TAG_ANNOTATION = "org.opencontainers.image.ref.name"
_LISTED_TAGS = 8
#: How long to wait for another process that changes the index (seconds); it holds the lock for milliseconds.
_LOCK_SECONDS = 30.0
#: A blob this large is copied into a file that a later copy goes on with if this one is interrupted.
_RESUMABLE_SIZE = 8 << 20


class Layout:
    """One layout directory. Thread-safe for reading; every blob writer belongs to one thread at a time."""

    verifies = True

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
        self._files = FilePool()
        self._lock = threading.Lock()
        if create:
            self._create()
        try:
            self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{self.path}: {error.strerror}", hint="give the directory of an OCI layout") from None
        try:
            self._check_marker()
            if create:
                with storage_errors(self.path):
                    remove_stale(self._root)
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
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / _LAYOUT_FILE).exists():
                return
            # What a creation that was cut short may have left is taken over; the marker comes last.
            if {item.name for item in self.path.iterdir()} - {_BLOBS.split("/")[0], _INDEX_FILE}:
                raise ConflictError(f"{self.path} is neither empty nor an OCI layout", hint="choose another directory")
            (self.path / _BLOBS).mkdir(parents=True, exist_ok=True)
            # Another process may be creating the same layout, and may have filled it already.
            for name, content in (
                (_INDEX_FILE, _index_bytes({"schemaVersion": 2, "manifests": []})),
                (_LAYOUT_FILE, json.dumps({"imageLayoutVersion": _LAYOUT_VERSION}).encode()),
            ):
                with contextlib.suppress(FileExistsError), open(self.path / name, "xb") as file:
                    file.write(content)

    # -- reading

    def manifest(self, reference: str | None = None) -> RawManifest:
        """The manifest of a tag or digest; None: what the reference named, or the only one of the layout.

        Raises: NotFoundError, UsageError where the choice is open, IntegrityError, FormatError.
        """
        manifest = self.document(reference)
        if manifest.media_type == _INDEX_TYPE:
            raise UnsupportedError(
                f"{self.path}: {manifest.digest} is an image index", hint="name one manifest by its digest"
            )
        return manifest

    def document(self, reference: str | None = None) -> RawManifest:
        """The manifest or index. Raises: as `manifest`, but for the index."""
        entry = self._find(reference or self._digest or self._tag)
        content = self.read_blob(entry, limit=MAX_MANIFEST_SIZE)
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
        """Random access; the file is opened when it is first read, and again if it was closed to save descriptors.

        The layout must stay open meanwhile. Raises: NotFoundError, IntegrityError where the size differs, StorageError.
        """
        status = self._stat_blob(descriptor.digest)
        self._check_regular(status, descriptor.digest)
        if status.st_size != descriptor.size:
            raise IntegrityError(
                f"blob {descriptor.digest} in {self.path} has {status.st_size} bytes, not {descriptor.size}"
            )
        return FileBlob(
            self._files,
            lambda: self._open_file(descriptor.digest),
            descriptor.size,
            f"{self.path}/{self._blob_name(descriptor.digest)}",
        )

    def _open_file(self, digest: str) -> int:
        name = self._blob_name(digest)
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._root)
        except FileNotFoundError:
            raise self._no_blob(digest) from None
        except OSError as error:
            raise StorageError(f"{self.path}/{name}: {error.strerror}") from None
        try:
            self._check_regular(os.fstat(file), digest)
        except BaseException:
            os.close(file)
            raise
        return file

    def _check_regular(self, status: os.stat_result, digest: str) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"blob {digest} in {self.path} is no regular file")

    def _no_blob(self, digest: str) -> NotFoundError:
        return NotFoundError(f"{self.path} has no blob {digest}", hint="copy the artifact again")

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """The blob from `offset` on, in order; from 0, verified by its end."""
        blob = self.open_blob(descriptor)
        digest = hashlib.sha256() if verify and offset == 0 else None
        try:
            for position in range(offset, descriptor.size, chunk_size):
                chunk = bytearray(min(chunk_size, descriptor.size - position))
                blob.read_into(position, memoryview(chunk))
                if digest is not None:
                    digest.update(chunk)
                yield bytes(chunk)
        finally:
            blob.close()
        if digest is not None and digest.digest() != parse_digest(descriptor.digest):
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
            raise self._no_blob(digest) from None
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None

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
            with storage_errors(self.path / name), os.fdopen(file, "rb", closefd=False) as stream:
                return stream.read(limit + 1)
        finally:
            os.close(file)

    def _index(self) -> dict[str, object]:
        content = self._read_file(_INDEX_FILE, MAX_MANIFEST_SIZE)
        return loads_object(content, limit=MAX_MANIFEST_SIZE, what=f"{self.path}/{_INDEX_FILE}")

    def _manifests(self, index: Mapping[str, object]) -> list[object]:
        entries = index.get("manifests")
        if not isinstance(entries, list):
            raise FormatError(f"{self.path}/{_INDEX_FILE} has no list of manifests")
        return entries

    def _entries(self) -> list[object]:
        return self._manifests(self._index())

    # -- writing

    def create_blob(self) -> FileBlobWriter:
        """A new blob. Raises: StorageError."""
        with storage_errors(self.path):
            directory = self._open_blobs()
            root = os.dup(self._root)
        try:
            return FileBlobWriter(root, directory, str(self.path))
        except BaseException:
            os.close(directory)
            os.close(root)
            raise

    def _open_blobs(self) -> int:
        os.makedirs(self.path / _BLOBS, exist_ok=True)
        return os.open(_BLOBS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)

    def copy_blob(
        self, descriptor: Descriptor, stream: Callable[[int], Iterator[bytes]], advance: Callable[[int], None]
    ) -> None:
        """Take over a blob whose bytes from an offset on `stream(offset)` gives; an interrupted copy is gone on with.

        `advance` hears of the bytes done. Raises: IntegrityError where the content is not the digest's, StorageError,
        what the stream raises.
        """
        name = parse_digest(descriptor.digest).hex()
        resume = name if descriptor.size >= _RESUMABLE_SIZE else None
        with contextlib.closing(FileWriter(self._root, str(self.path), resume=resume)) as writer:
            try:
                _fill(writer, descriptor, stream, advance)
            except IntegrityError:
                writer.discard()
                raise
            with storage_errors(self.path):
                directory = self._open_blobs()
            try:
                writer.publish(directory, name)
            finally:
                os.close(directory)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        """A small blob in one call. Raises: StorageError."""
        writer = self.create_blob()
        try:
            writer.write(content)
            return writer.commit(media_type)
        finally:
            writer.abort()

    def write_manifest(self, content: bytes, media_type: str) -> Descriptor:
        """A manifest that an index is going to name: a blob like any other. Raises: StorageError."""
        return self.write_blob(content, media_type)

    def remove_blob(self, descriptor: Descriptor) -> None:
        """Take back a blob that no manifest names yet."""
        with storage_errors(self.path), contextlib.suppress(FileNotFoundError):
            os.unlink(self._blob_name(descriptor.digest), dir_fd=self._root)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """Write a manifest, then let the tag name it. Other tags stay.

        On failure the manifest is taken back, unless it was there before or the index has come to name it.

        Raises: UsageError where the tag is none, FormatError where the index is damaged, ConflictError, StorageError.
        """
        if tag:
            check_layout_tag(tag)
        manifest = Descriptor(media_type, sha256_digest(content), len(content))
        known = self.has_blob(manifest)
        try:
            return self._put_manifest(content, media_type, tag, artifact_type)
        except BaseException:
            with contextlib.suppress(EncfsError):
                if not known and all(item.digest != manifest.digest for item in map(_parse_entry, self._entries())):
                    self.remove_blob(manifest)
            raise

    def _put_manifest(self, content: bytes, media_type: str, tag: str | None, artifact_type: str | None) -> Descriptor:
        blob = self.write_blob(content, media_type)
        entry: dict[str, object] = {"mediaType": media_type, "digest": blob.digest, "size": blob.size}
        if artifact_type:
            entry["artifactType"] = artifact_type
        if tag:
            entry["annotations"] = {_TAG_ANNOTATION: tag}
        with self._locked_index() as index:
            entries = self._manifests(index)
            if tag:
                entries[:] = [item for item in entries if _parse_entry(item).annotations.get(_TAG_ANNOTATION) != tag]
            if entry not in entries:
                entries.append(entry)
        return blob

    def untag(self, tag: str) -> None:
        """Drop a tag; blobs stay. Raises: NotFoundError, StorageError."""
        with self._locked_index() as index:
            entries = self._manifests(index)
            kept = [item for item in entries if _parse_entry(item).annotations.get(_TAG_ANNOTATION) != tag]
            if len(kept) == len(entries):
                raise NotFoundError(f"{self.path} has no tag {tag!r}")
            entries[:] = kept

    @contextlib.contextmanager
    def _locked_index(self) -> Iterator[dict[str, object]]:
        """The parsed index under a lock against other threads and processes; written back if the block ends well."""
        with self._lock:
            self._lock_directory()
            try:
                index = self._index()
                yield index
                self._write_index(_index_bytes(index))
            finally:
                fcntl.flock(self._root, fcntl.LOCK_UN)

    def _lock_directory(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConflictError(
                        f"{self.path} is locked by another process", hint="try again when that is done"
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                raise StorageError(f"{self.path} cannot be locked: {error.strerror}") from None
            else:
                return

    def _write_index(self, content: bytes) -> None:
        if len(content) > MAX_MANIFEST_SIZE:
            raise StorageError(f"{self.path}/{_INDEX_FILE} would be larger than 4 MiB", hint="use another layout")
        with storage_errors(self.path / _INDEX_FILE):
            # One temporary name is enough under the lock, and what a crash leaves there is written over.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(_NEW_INDEX_FILE, flags, 0o644, dir_fd=self._root)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(file)
                os.rename(_NEW_INDEX_FILE, _INDEX_FILE, src_dir_fd=self._root, dst_dir_fd=self._root)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):  # it may have its new name already
                    os.unlink(_NEW_INDEX_FILE, dir_fd=self._root)
                raise
            os.fsync(self._root)

    def close(self) -> None:
        """Harmless when called again."""
        self._files.close()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1


def _fill(
    writer: FileWriter,
    descriptor: Descriptor,
    stream: Callable[[int], Iterator[bytes]],
    advance: Callable[[int], None],
) -> None:
    """Write what is missing. Raises: IntegrityError where the whole is not the descriptor's, what the stream raises."""
    if writer.position < descriptor.size:
        advance(writer.position)
        for chunk in stream(writer.position):
            if writer.position + len(chunk) > descriptor.size:
                raise IntegrityError(f"blob {descriptor.digest} came with more bytes than its size {descriptor.size}")
            writer.write(chunk)
            advance(len(chunk))
    if writer.position != descriptor.size or f"sha256:{writer.hexdigest()}" != descriptor.digest:
        raise IntegrityError(f"blob {descriptor.digest} came with other content than its digest says")


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
