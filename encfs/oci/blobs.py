"""What every store of OCI content offers: descriptors, random access to untrusted blobs, and writing.

Protocols only; `layout` (a directory) and `registry` (a server) implement them, `cache` wraps one. Everything read
through them is untrusted: whoever asks for random access checks what comes back against the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview

#: Largest manifest or config blob that is ever read (bytes); registries refuse more than 4 MiB.
MAX_MANIFEST_SIZE = 4 << 20


@dataclass(frozen=True, slots=True)
class Descriptor:
    """An OCI content descriptor (image-spec, descriptor.md). `size` in bytes, `digest` as `sha256:<64 hex digits>`."""

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawManifest:
    """The exact bytes of a manifest or index, its digest computed by the reader, and its media type."""

    content: bytes
    digest: str
    media_type: str


@runtime_checkable
class Blob(Protocol):
    """Random access to one blob's untrusted bytes. Thread-safe."""

    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset` (bytes); may block on disk or network.

        Raises: IntegrityError where the blob is shorter than it claims; StorageError or TransportError where the
        store fails; NotFoundError where the blob is gone.
        """

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """The same if the bytes are at hand without waiting for disk or network; False (buffer undefined) otherwise."""

    def discard(self, offset: int, size: int) -> bool:
        """These bytes did not verify: drop any local copy of them. True if reading again may give others."""

    def close(self) -> None: ...


class BlobSource(Protocol):
    """A place to read artifacts from. Thread-safe."""

    def manifest(self, reference: str | None = None) -> RawManifest:
        """The manifest of a tag or digest (None: the one the reference named); its digest is the one computed."""

    def document(self, reference: str | None = None) -> RawManifest:
        """The same, for who takes an image index as well."""

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """A small blob whole, its size and digest verified. FormatError where it states more than `limit` bytes."""

    def open_blob(self, descriptor: Descriptor) -> Blob:
        """Random access; nothing is verified."""

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """The blob from `offset` (bytes) on, in order, in pieces of about `chunk_size`.

        Size and digest are verified and IntegrityError is raised by the end at the latest; not from another offset
        than 0 (only who has the part before can tell), and not without `verify` (for who does it anyway).
        """

    def has_blob(self, descriptor: Descriptor) -> bool: ...

    def close(self) -> None: ...


class BlobWriter(Protocol):
    """One blob being written. Invisible under its digest until `commit`."""

    def write(self, data: Buffer) -> None: ...

    def digest(self) -> str:
        """The digest of what was written so far."""

    def commit(self, media_type: str) -> Descriptor:
        """Make it durable and visible; the descriptor carries the digest and size of what was written."""

    def abort(self) -> None:
        """Throw it away; harmless after `commit`."""


class BlobSink(Protocol):
    """A place to write artifacts to."""

    def create_blob(self) -> BlobWriter: ...

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        """A small blob in one call."""

    def has_blob(self, descriptor: Descriptor) -> bool: ...

    def remove_blob(self, descriptor: Descriptor) -> None:
        """Take back a blob of a failed upload that no manifest names yet; harmless where the store cannot delete."""

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """Write a manifest and move the tag to it as the last step: until then no reader sees any of it."""

    def close(self) -> None: ...


class BlobTarget(BlobSink, Protocol):
    """A sink that whole artifacts can be copied to."""

    #: Whether `copy_blob` checks digests by itself.
    verifies: bool

    def write_manifest(self, content: bytes, media_type: str) -> Descriptor:
        """A manifest that an index is going to name: there by its digest, under no tag and in no list."""

    def copy_blob(
        self, descriptor: Descriptor, stream: Callable[[int], Iterator[bytes]], advance: Callable[[int], None]
    ) -> None:
        """Take over a blob that exists elsewhere; `stream(offset)` gives its bytes from there on, as often as called.

        A copy that was interrupted goes on where it stopped, as far as the store can. `advance` hears of bytes done.
        Raises: IntegrityError where the content is not the digest's; StorageError, TransportError, what `stream` does.
        """
