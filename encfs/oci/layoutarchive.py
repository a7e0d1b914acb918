"""A tar archive of an OCI image layout (`oci-archive:`, as skopeo and podman write it) as a source and a sink.

Blobs are read where they lie in the archive. Written is a layout in a hidden directory beside the archive, which moves
into the archive file by file when it is complete; the archive then gets its name in one step. What a writer that was
killed leaves of it is removed by the next one of the same archive. Not here: reading tar (`encfs.tar`), what `docker
save` writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO

from encfs.errors import ConflictError, FormatError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.oci.files import FileBlob, FilePool, storage_errors
from encfs.oci.layout import Layout
from encfs.oci.layoutdirectory import BLOBS, INDEX_FILE, LAYOUT_FILE, MAX_MARKER, check_marker
from encfs.oci.layoutindex import parse_entries
from encfs.oci.layoutsource import LayoutSource, blob_name
from encfs.tar.file import TarFile

#: What the hidden directories' names have behind that of their archive.
_PARTIAL = ".encfs-partial-"
#: Seconds after which a hidden directory that nobody is at work in was left behind, and is not just being made.
_STALE_SECONDS = 60.0
_HINT = "give what skopeo copy … oci-archive:FILE or podman save --format oci-archive has written"


class LayoutArchive(LayoutSource):
    """One archive file, not compressed. Thread-safe."""

    def __init__(self, path: str, *, tag: str | None = None, digest: str | None = None) -> None:
        """`tag` or `digest` say what `manifest()` gives.

        Raises: NotFoundError, StorageError; UsageError, UnsupportedError, SourceError, FormatError where it is no such
        archive.
        """
        super().__init__(path, tag, digest)
        self._files = FilePool()
        self._tar = TarFile(path, hint=_HINT)
        try:
            check_marker(self._document(LAYOUT_FILE, MAX_MARKER), path)
            self._entries = parse_entries(self._document(INDEX_FILE, MAX_MANIFEST_SIZE), path)
        except BaseException:
            self._tar.close()
            raise

    def _document(self, name: str, limit: int) -> bytes:
        if name not in self._tar.members:
            raise FormatError(f"{self._tar.path} is no archive of an OCI layout: it has no {name}", hint=_HINT)
        return self._tar.small(name, limit)

    def entries(self) -> list[Descriptor]:
        """As `LayoutSource.entries`."""
        return self._entries

    def blob_size(self, digest: str) -> int:
        """As `LayoutSource.blob_size`."""
        name = blob_name(digest)
        if name not in self._tar.members:
            raise self._no_blob(digest)
        return self._tar.find(name).size

    def open_blob(self, descriptor: Descriptor) -> FileBlob:
        """Random access; the archive must stay open meanwhile. Raises: NotFoundError, IntegrityError, FormatError."""
        self._check_size(descriptor)
        name = blob_name(descriptor.digest)
        start = self._tar.find(name).offset
        return FileBlob(self._files, self._duplicate, descriptor.size, f"{self._tar.path}/{name}", start=start)

    def _duplicate(self) -> int:
        with storage_errors(self._tar.path):
            return os.dup(self._tar.file)

    def close(self) -> None:
        """Harmless when called again."""
        self._files.close()
        self._tar.close()


class ArchiveSink(Layout):
    """An archive that does not exist yet: it appears when its manifest is put, with everything written before.

    One manifest or index goes into an archive. Close it: without a manifest nothing is left.
    """

    def __init__(self, path: str) -> None:
        """Raises: ConflictError where something has that name, StorageError."""
        self._archive = Path(path)
        self._check_free()
        with storage_errors(path):
            self._remove_stale()
            prefix = f".{self._archive.name}{_PARTIAL}"
            self._directory = Path(tempfile.mkdtemp(prefix=prefix, dir=self._archive.parent))
        try:
            super().__init__(self._directory / "layout", create=True)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    def _check_free(self) -> None:
        if os.path.lexists(self._archive):
            raise ConflictError(f"{self._archive} exists", hint="an archive is written once; choose another name")

    def _remove_stale(self) -> None:
        """What a writer of the same archive left that was killed."""
        for path in self._archive.parent.glob(f".{glob.escape(self._archive.name)}{_PARTIAL}*"):
            # Who writes holds a shared lock on the marker (`layoutdirectory`).
            with contextlib.suppress(OSError), open(path / "layout" / LAYOUT_FILE, "rb", opener=_open_marker) as marker:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(marker.fileno()).st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """Put the manifest in, and let the archive appear. Raises: as `Layout.put_manifest`, ConflictError."""
        manifest = super().put_manifest(content, media_type, tag=tag, artifact_type=artifact_type)
        partial = self._directory / "archive"
        with storage_errors(self._archive):
            with open(partial, "xb") as file:
                self._write(file)
                file.flush()
                os.fsync(file.fileno())
            self._publish(partial)
        return manifest

    def _write(self, file: IO[bytes]) -> None:
        # Marker and index first, so that readers of streams know what comes.
        names = [LAYOUT_FILE, INDEX_FILE, *sorted(f"{BLOBS}/{one}" for one in os.listdir(self.path / BLOBS))]
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name in names:
                with open(self.path / name, "rb") as source:
                    member = tarfile.TarInfo(name)
                    member.size = os.fstat(source.fileno()).st_size
                    member.mode = 0o644
                    archive.addfile(member, source)
                if name.startswith(BLOBS):
                    # What is in the archive needs its room no more.
                    (self.path / name).unlink()

    def _publish(self, partial: Path) -> None:
        try:
            os.link(partial, self._archive)
        except FileExistsError:
            self._check_free()
            raise
        directory = os.open(self._archive.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def close(self) -> None:
        """Remove what is not in the archive. Harmless when called again."""
        super().close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _open_marker(path: str, flags: int) -> int:
    # In a directory that others write to, it may be a pipe that nobody ever writes to.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
