"""Reading an OCI image layout, wherever its files lie: the manifest of a tag or digest, and blobs as they are named.

Not here: the files of a directory (`layout`) or of an archive (`layoutarchive`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import FormatError, IntegrityError, NotFoundError, UnsupportedError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor, RawManifest
from encfs.oci.files import FileBlob
from encfs.oci.layoutdirectory import BLOBS
from encfs.oci.layoutindex import find_entry, tags_of

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


class LayoutSource(ABC):
    """What every layout can be asked for. Thread-safe."""

    def __init__(self, where: object, tag: str | None, digest: str | None) -> None:
        """`where` names the layout in messages; `tag` or `digest` say what `manifest()` gives."""
        self._where = where
        self._tag = tag
        self._digest = digest

    @abstractmethod
    def entries(self) -> list[Descriptor]:
        """What the index lists. Raises: NotFoundError, FormatError, StorageError."""

    @abstractmethod
    def blob_size(self, digest: str) -> int:
        """The size of a blob that is there (bytes). Raises: NotFoundError, IntegrityError, StorageError."""

    @abstractmethod
    def open_blob(self, descriptor: Descriptor) -> FileBlob:
        """Random access; nothing is verified. Raises: NotFoundError, IntegrityError where the size differs."""

    def manifest(self, reference: str | None = None) -> RawManifest:
        """The manifest of a tag or digest; None: what the reference named, or the only one of the layout.

        Raises: NotFoundError, UsageError where the choice is open, IntegrityError, FormatError.
        """
        manifest = self.document(reference)
        if manifest.media_type == _INDEX_TYPE:
            raise UnsupportedError(
                f"{self._where}: {manifest.digest} is an image index", hint="name one manifest by its digest"
            )
        return manifest

    def document(self, reference: str | None = None) -> RawManifest:
        """The manifest or index. Raises: as `manifest`, but for the index."""
        named = reference or self._digest or self._tag
        entry = find_entry(self.entries(), named, self._where)
        if entry is None:
            # A manifest that no tag names any more is still addressed by its digest.
            entry = Descriptor(_MANIFEST_TYPE, str(named), self.blob_size(str(named)))
        content = self.read_blob(entry, limit=MAX_MANIFEST_SIZE)
        return RawManifest(content, entry.digest, entry.media_type)

    def tags(self) -> list[str]:
        """All tags, sorted."""
        return tags_of(self.entries())

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
            raise IntegrityError(f"blob {descriptor.digest} in {self._where} has other content than its digest says")
        return bytes(content)

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
            raise IntegrityError(f"blob {descriptor.digest} in {self._where} has other content than its digest says")

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether a blob of that digest and size lies here; its content is not looked at."""
        try:
            return self.blob_size(descriptor.digest) == descriptor.size
        except (NotFoundError, IntegrityError):
            return False

    def _check_size(self, descriptor: Descriptor) -> None:
        """Raises: as `blob_size`, and IntegrityError where it differs."""
        size = self.blob_size(descriptor.digest)
        if size != descriptor.size:
            raise IntegrityError(f"blob {descriptor.digest} in {self._where} has {size} bytes, not {descriptor.size}")

    def _no_blob(self, digest: str) -> NotFoundError:
        return NotFoundError(f"{self._where} has no blob {digest}", hint="copy the artifact again")


def blob_name(digest: str) -> str:
    """The path of a blob in a layout. Raises: FormatError."""
    return f"{BLOBS}/{parse_digest(digest).hex()}"
