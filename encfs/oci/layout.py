"""An OCI image layout directory (image-spec, image-layout.md) as a source and a sink of blobs.

A blob gets its name when it is complete, and the index is replaced in one step, so that a crash leaves no half of
anything. Not here: the directory (`layoutdirectory`) and the index (`layoutindex`), reading and writing the files of
blobs (`files`), what the blobs mean (`encfs.format`).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    EncfsError,
    IntegrityError,
    StorageError,
)
from encfs.oci.blobs import Descriptor
from encfs.oci.files import FileBlob, FileBlobWriter, FilePool, FileWriter, remove_stale, storage_errors
from encfs.oci.layoutdirectory import BLOBS, LayoutMaker, open_layout
from encfs.oci.layoutindex import LayoutIndex
from encfs.oci.layoutsource import LayoutSource, blob_name
from encfs.oci.reference import check_layout_tag

#: A blob this large is copied into a file that a later copy goes on with if this one is interrupted.
_RESUMABLE_SIZE = 8 << 20


class Layout(LayoutSource):
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
        super().__init__(self.path, tag, digest)
        self._files = FilePool()
        self._maker = LayoutMaker(self.path) if create else None
        try:
            self._root = open_layout(self.path)
        except BaseException:
            self._end_making()
            raise
        self._index = LayoutIndex(self._root, self.path)
        if create:
            try:
                with storage_errors(self.path):
                    remove_stale(self._root)
            except BaseException:
                self.close()
                raise

    # -- reading

    def entries(self) -> list[Descriptor]:
        """As `LayoutSource.entries`."""
        return self._index.entries()

    def open_blob(self, descriptor: Descriptor) -> FileBlob:
        """Random access; the file is opened when it is first read, and again if it was closed to save descriptors.

        The layout must stay open meanwhile. Raises: NotFoundError, IntegrityError where the size differs, StorageError.
        """
        self._check_size(descriptor)
        return FileBlob(
            self._files,
            lambda: self._open_file(descriptor.digest),
            descriptor.size,
            f"{self.path}/{blob_name(descriptor.digest)}",
        )

    def _open_file(self, digest: str) -> int:
        name = blob_name(digest)
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

    def blob_size(self, digest: str) -> int:
        """As `LayoutSource.blob_size`."""
        try:
            status = os.stat(blob_name(digest), dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            raise self._no_blob(digest) from None
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None
        self._check_regular(status, digest)
        return status.st_size

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
        os.makedirs(self.path / BLOBS, exist_ok=True)
        return os.open(BLOBS, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._root)

    def copy_blob(
        self, descriptor: Descriptor, stream: Callable[[int], Iterator[bytes]], advance: Callable[[int], None]
    ) -> None:
        """Take over a blob whose bytes from an offset on `stream(offset)` gives; an interrupted copy is gone on with.

        `advance` hears of the bytes done, of fewer than none where some must be done again. Raises: IntegrityError
        where the content is not the digest's, StorageError, what the stream raises.
        """
        name = parse_digest(descriptor.digest).hex()
        resume = descriptor if descriptor.size >= _RESUMABLE_SIZE else None
        with contextlib.closing(FileWriter(self._root, str(self.path), resume=resume)) as writer:
            try:
                _fill_resumed(writer, descriptor, stream, advance)
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
            os.unlink(blob_name(descriptor.digest), dir_fd=self._root)

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
                if not known and all(entry.digest != manifest.digest for entry in self._index.entries()):
                    self.remove_blob(manifest)
            raise

    def _put_manifest(self, content: bytes, media_type: str, tag: str | None, artifact_type: str | None) -> Descriptor:
        blob = self.write_blob(content, media_type)
        self._index.add(replace(blob, artifact_type=artifact_type), tag)
        return blob

    def untag(self, tag: str) -> None:
        """Drop a tag; blobs stay. Raises: NotFoundError, StorageError."""
        self._index.untag(tag)

    def close(self) -> None:
        """A layout that was made for this, and that nothing came into, goes again. Harmless when called again."""
        self._files.close()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
        self._end_making()

    def _end_making(self) -> None:
        if self._maker is not None:
            self._maker.close()


def _fill_resumed(
    writer: FileWriter,
    descriptor: Descriptor,
    stream: Callable[[int], Iterator[bytes]],
    advance: Callable[[int], None],
) -> None:
    """As `_fill`; a second time from the beginning where the fault may be in what was there already."""
    resumed = writer.position > 0
    try:
        _fill(writer, descriptor, stream, advance)
    except IntegrityError:
        if not resumed:
            raise
        advance(-writer.position)
        writer.restart()
        _fill(writer, descriptor, stream, advance)


def _fill(
    writer: FileWriter,
    descriptor: Descriptor,
    stream: Callable[[int], Iterator[bytes]],
    advance: Callable[[int], None],
) -> None:
    """Write what is missing. Raises: IntegrityError where the whole is not the descriptor's, what the stream raises."""
    advance(writer.position)
    if writer.position < descriptor.size:
        for chunk in stream(writer.position):
            if writer.position + len(chunk) > descriptor.size:
                raise IntegrityError(f"blob {descriptor.digest} came with more bytes than its size {descriptor.size}")
            writer.write(chunk)
            advance(len(chunk))
    if writer.position != descriptor.size or f"sha256:{writer.hexdigest()}" != descriptor.digest:
        raise IntegrityError(f"blob {descriptor.digest} came with other content than its digest says")
