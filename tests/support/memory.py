"""A store in memory, for tests that change single bytes thousands of times. Real stores have tests of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from encfs.encoding import sha256_digest
from encfs.errors import FormatError, IntegrityError, NotFoundError
from encfs.oci.blobs import Buffer, Descriptor, RawManifest


class MemoryBlob:
    """Random access to bytes that the test may change at any time."""

    def __init__(self, store: MemoryStore, digest: str, size: int) -> None:
        self._store, self._digest, self.size = store, digest, size
        if len(store.blobs[digest]) != size:
            raise IntegrityError(f"blob {digest} has {len(store.blobs[digest])} bytes, not {size}")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._store.reads += 1
        self._store.bytes_fetched += len(buffer)
        content = self._store.blobs[self._digest][offset : offset + len(buffer)]
        if len(content) != len(buffer):
            raise IntegrityError(f"blob {self._digest} is shorter than it claims")
        buffer[:] = content

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        if not self._store.at_hand:
            return False
        self.read_into(offset, buffer)
        return True

    def discard(self, offset: int, size: int) -> bool:
        return False

    def close(self) -> None:
        return


class MemoryWriter:
    def __init__(self, store: MemoryStore) -> None:
        self._store, self._content = store, bytearray()

    def write(self, data: Buffer) -> None:
        self._content += data

    def digest(self) -> str:
        return sha256_digest(self._content)

    def commit(self, media_type: str) -> Descriptor:
        return self._store.write_blob(bytes(self._content), media_type)

    def abort(self) -> None:
        self._content.clear()


class MemoryStore:
    """BlobSource and BlobSink. `blobs` by digest; `tags` by name; `latest` is what a reference without tag names."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes | bytearray] = {}
        self.tags: dict[str, RawManifest] = {}
        self.latest: RawManifest | None = None
        self.at_hand = True
        self.reads = 0
        self.bytes_fetched = 0

    def manifest(self, reference: str | None = None) -> RawManifest:
        manifest = self.tags.get(reference) if reference else self.latest
        if manifest is None:
            raise NotFoundError(f"no manifest {reference}")
        return manifest

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        if descriptor.size > limit:
            raise FormatError(f"blob of {descriptor.size} bytes, more than {limit}")
        if descriptor.digest not in self.blobs:
            raise NotFoundError(f"no blob {descriptor.digest}")
        content = bytes(self.blobs[descriptor.digest])
        if len(content) != descriptor.size or sha256_digest(content) != descriptor.digest:
            raise IntegrityError(f"blob {descriptor.digest} has another digest")
        return content

    def open_blob(self, descriptor: Descriptor) -> MemoryBlob:
        if descriptor.digest not in self.blobs:
            raise NotFoundError(f"no blob {descriptor.digest}")
        return MemoryBlob(self, descriptor.digest, descriptor.size)

    def stream_blob(self, descriptor: Descriptor, *, chunk_size: int = 1 << 20) -> Iterator[bytes]:
        content = bytes(self.blobs[descriptor.digest])
        yield from (content[start : start + chunk_size] for start in range(0, len(content), chunk_size))
        if f"sha256:{hashlib.sha256(content).hexdigest()}" != descriptor.digest:
            raise IntegrityError(f"blob {descriptor.digest} has another digest")

    def has_blob(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.blobs

    def remove_blob(self, descriptor: Descriptor) -> None:
        self.blobs.pop(descriptor.digest, None)

    def create_blob(self) -> MemoryWriter:
        return MemoryWriter(self)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        digest = sha256_digest(content)
        self.blobs[digest] = content
        return Descriptor(media_type, digest, len(content))

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        descriptor = self.write_blob(content, media_type)
        self.latest = RawManifest(content, descriptor.digest, media_type)
        if tag:
            self.tags[tag] = self.latest
        return descriptor

    def close(self) -> None:
        return
