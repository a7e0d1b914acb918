"""A repository in a registry (OCI distribution-spec) as a source and a sink of blobs.

Constant memory whatever the sizes. What is written without a known digest goes through a temporary file first, and is
uploaded from there while the next blob is written: an interrupted upload can then be resumed, and an encrypted frame is
never made twice. Not here: single requests (`client`), ranges of blobs (`remote`), uploads (`upload`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from rfc8785 import dumps as canonical_json

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    TransportError,
    UnsupportedError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Buffer, Descriptor, RawManifest
from encfs.oci.client import Client
from encfs.oci.counters import TransferCounters
from encfs.oci.files import FileWriter, storage_errors
from encfs.oci.http import content_length, resolve, status_error
from encfs.oci.options import StoreOptions
from encfs.oci.reference import DEFAULT_TAG, Reference, check_registry_tag
from encfs.oci.remote import RangeBlob, RemoteBlob
from encfs.oci.upload import Uploader
from encfs.strictjson import loads_object, show_name

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
_ACCEPT = ", ".join((MANIFEST_TYPE, _DOCKER_MANIFEST_TYPE, INDEX_TYPE, _DOCKER_INDEX_TYPE))
_SUCCESS = frozenset({200})
_STORED = frozenset({200, 201, 202})

#: Segments that wait for their upload or are being uploaded; with the one being written, so many lie in the spool.
_MAX_PENDING = 2
_READ_SIZE = 1 << 20
_MAX_REFERRER_PAGES = 16
_MAX_REFERRERS = 1024


class Registry:
    """One repository. Thread-safe."""

    verifies = False

    def __init__(
        self,
        reference: Reference,
        options: StoreOptions | None = None,
        *,
        plain_http: bool | None = None,
        attempts: int | None = None,
        counters: TransferCounters | None = None,
    ) -> None:
        """`attempts` bounds the tries of one request, besides the time. No request is made yet. Raises: UsageError."""
        self.options = options or StoreOptions()
        self.reference = reference
        plain = self.options.plain_http if plain_http is None else plain_http
        self.client = Client(
            reference.registry,
            reference.repository,
            self.options,
            plain_http=plain,
            attempts=attempts,
            counters=counters,
        )
        self._tag = reference.tag or (None if reference.digest else DEFAULT_TAG)
        self._uploader = Uploader(self.client)
        self._uploads = _Uploads(self._uploader)
        self._mount_from = ""

    def __str__(self) -> str:
        return f"{self.reference.registry}/{self.reference.repository}"

    # -- reading

    def manifest(self, reference: str | None = None) -> RawManifest:
        """The manifest of a tag or digest; None: of what the reference named.

        Raises: NotFoundError, UnsupportedError for an index, IntegrityError, TransportError, AuthenticationError.
        """
        manifest = self.document(reference)
        if manifest.media_type in (INDEX_TYPE, _DOCKER_INDEX_TYPE):
            raise UnsupportedError(
                f"{self}: {manifest.digest} is an image index", hint="name one manifest by its digest"
            )
        return manifest

    def document(self, reference: str | None = None, *, attempts: int | None = None) -> RawManifest:
        """The manifest or index; `attempts` bounds the tries, besides the time.

        Raises: NotFoundError, IntegrityError, TransportError, AuthenticationError.
        """
        name = reference or self.reference.digest or self._tag or DEFAULT_TAG
        return self._fetch_manifest(name, _ACCEPT, attempts)

    def _fetch_manifest(self, name: str, accept: str, attempts: int | None = None) -> RawManifest:
        if not name.startswith("sha256:"):
            check_registry_tag(name)
        response = self.client.request(
            self.client.url("manifests", name),
            "GET",
            f"manifest {name} of {self}",
            _SUCCESS,
            headers={"Accept": accept},
            patience=self.client.patience(attempts),
        )
        content = response.content
        digest = sha256_digest(content)
        if name.startswith("sha256:") and name != digest:
            raise IntegrityError(f"{self}: the manifest that comes for {name} has the digest {digest}")
        media_type = response.headers.get("Content-Type", "").split(";")[0].strip()
        return RawManifest(content, digest, media_type or MANIFEST_TYPE)

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """A small blob whole, verified; once more where wrong bytes came.

        Raises: FormatError, IntegrityError, NotFoundError, TransportError, AuthenticationError.
        """
        if descriptor.size > limit:
            raise FormatError(f"blob {descriptor.digest} has {descriptor.size} bytes, more than the {limit} allowed")
        blob = self.open_blob(descriptor)
        for _ in range(2):
            content = bytearray(descriptor.size)
            blob.read_into(0, memoryview(content))
            if sha256_digest(content) == descriptor.digest:
                return bytes(content)
        raise IntegrityError(f"blob {descriptor.digest} of {self} has other content than its digest says")

    def open_blob(self, descriptor: Descriptor) -> RemoteBlob:
        """Random access by Range requests; nothing is fetched or verified yet. Raises: FormatError."""
        parse_digest(descriptor.digest)
        return RemoteBlob(self.client, descriptor)

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """The blob from `offset` on, in pieces of any size, resumed after cuts; from 0, verified by its end."""
        return stream_in_order(self.open_blob(descriptor), descriptor, str(self), offset=offset, verify=verify)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the repository has a blob of that digest and size. Raises: TransportError, AuthenticationError."""
        parse_digest(descriptor.digest)
        response = self.client.do_request(self.client.url("blobs", descriptor.digest), "HEAD")
        if response.status_code == 200:
            return content_length(response) in (None, descriptor.size)
        if response.status_code in (404, 410):
            return False
        raise status_error(response, b"", f"blob {descriptor.digest} of {self}")

    def referrers(self, digest: str, artifact_type: str | None = None) -> list[Descriptor]:
        """Manifests whose `subject` is `digest`, at most 1,024 (distribution-spec, "Listing Referrers").

        Raises: FormatError, TransportError, AuthenticationError.
        """
        parse_digest(digest)
        found: list[Descriptor] = []
        query = f"?artifactType={artifact_type}" if artifact_type else ""
        url = self.client.url("referrers", digest + query)
        for _ in range(_MAX_REFERRER_PAGES):
            response = self.client.do_request(url, headers={"Accept": INDEX_TYPE})
            if response.status_code == 404:
                found = self._tagged_referrers(digest)
                break
            if response.status_code != 200:
                raise status_error(response, response.content, f"referrers of {digest}")
            found += parse_index(response.content)
            link = response.links.get("next", {}).get("url")
            if not link or len(found) >= _MAX_REFERRERS:
                break
            url = resolve(response.url, link)
        return [item for item in found if artifact_type in (None, item.artifact_type)][:_MAX_REFERRERS]

    def _tagged_referrers(self, digest: str) -> list[Descriptor]:
        """The list kept under a tag where the registry has no referrers API ("Referrers Tag Schema")."""
        try:
            return parse_index(self._fetch_manifest(digest.replace(":", "-"), INDEX_TYPE).content)
        except NotFoundError:
            return []

    # -- writing

    def prefer_mounting(self, source: object) -> None:
        """Have blobs mounted from another repository of the same registry rather than uploaded."""
        # A source behind a cache says by this which registry it is.
        source = getattr(source, "origin", source)
        if isinstance(source, Registry) and source.reference.registry == self.reference.registry:
            self._mount_from = source.reference.repository

    def create_blob(self) -> SpooledWriter:
        """A new blob; it is uploaded in the background after its commit. Raises: StorageError."""
        return SpooledWriter(self._uploads, self.options.spool)

    def write_blob(self, content: bytes, media_type: str) -> Descriptor:
        """A small blob in one call. Raises: TransportError, AuthenticationError."""
        blob = Descriptor(media_type, sha256_digest(content), len(content))
        if not self.has_blob(blob):
            self._uploader.upload(blob, lambda offset: iter([content[offset:]]), lambda size: None)
        return blob

    def copy_blob(
        self, descriptor: Descriptor, stream: Callable[[int], Iterator[bytes]], advance: Callable[[int], None]
    ) -> None:
        """Upload a blob that exists elsewhere, or have it mounted; see `BlobTarget.copy_blob`."""
        self._uploader.upload(descriptor, stream, advance, mount_from=self._mount_from)

    def remove_blob(self, descriptor: Descriptor) -> None:
        """Take back a blob that no manifest names yet; most registries only let their own clean-up do that."""
        self._uploads.cancel(descriptor.digest)
        with contextlib.suppress(TransportError, NotFoundError):
            self.client.do_request(
                self.client.url("blobs", descriptor.digest), "DELETE", patience=self.client.patience(attempts=1)
            )

    def put_manifest(
        self, content: bytes, media_type: str, *, tag: str | None = None, artifact_type: str | None = None
    ) -> Descriptor:
        """Wait for the uploads, then put a manifest under the tag (that of the reference; none: its digest).

        Raises: TransportError, AuthenticationError, IntegrityError, UsageError.
        """
        tag = tag or self._tag
        if tag is not None:
            check_registry_tag(tag)
        return self._put_manifest(content, media_type, tag or sha256_digest(content), artifact_type)

    def write_manifest(self, content: bytes, media_type: str) -> Descriptor:
        """Wait for the uploads, then put a manifest that an index is going to name. Raises: as `put_manifest`."""
        return self._put_manifest(content, media_type, sha256_digest(content), None)

    def _put_manifest(self, content: bytes, media_type: str, name: str, artifact_type: str | None) -> Descriptor:
        self._uploads.wait()
        digest = sha256_digest(content)
        response = self.client.request(
            self.client.url("manifests", name),
            "PUT",
            f"manifest {name} of {self}",
            _STORED,
            data=content,
            headers={"Content-Type": media_type},
        )
        stored = response.headers.get("Docker-Content-Digest", digest)
        if stored != digest:
            raise IntegrityError(f"{self} stores the manifest {digest} as {show_name(stored)}")
        descriptor = Descriptor(media_type, digest, len(content), artifact_type)
        if "OCI-Subject" not in response.headers:
            self._add_tagged_referrer(content, descriptor)
        return descriptor

    def _add_tagged_referrer(self, content: bytes, descriptor: Descriptor) -> None:
        """Keep the list of referrers where the registry does not ("Pushing Manifests with Subject")."""
        manifest = loads_object(content, limit=MAX_MANIFEST_SIZE, what="manifest")
        subject = manifest.get("subject")
        if not isinstance(subject, dict):
            return
        digest = subject.get("digest")
        parse_digest(digest, "the digest of the manifest's subject")
        listed = self._tagged_referrers(str(digest))
        if any(item.digest == descriptor.digest for item in listed):
            return
        descriptor = replace(descriptor, artifact_type=descriptor.artifact_type or _artifact_type(manifest))
        manifests = [_descriptor_document(item) for item in (*listed, descriptor)]
        index = canonical_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests})
        name = str(digest).replace(":", "-")
        self.client.request(
            self.client.url("manifests", name),
            "PUT",
            f"the list of referrers of {digest}",
            _STORED,
            data=index,
            headers={"Content-Type": INDEX_TYPE},
        )

    def close(self) -> None:
        """End uploads and reads that are under way. Harmless when called again."""
        self.client.close()
        self._uploads.close()


def stream_in_order(
    blob: RangeBlob, descriptor: Descriptor, label: str, *, offset: int, verify: bool
) -> Iterator[bytes]:
    """The bytes of a blob from `offset` on, whose pieces come in order and maybe with more before them.

    Raises: IntegrityError where all of them, which `verify` asks to check, are not the digest's; what the blob raises.
    """
    digest = hashlib.sha256() if verify and offset == 0 else None
    done = offset
    for position, chunk in blob.pieces(offset, descriptor.size - offset):
        piece = chunk[max(0, done - position) :]
        if piece:
            done += len(piece)
            if digest is not None:
                digest.update(piece)
            yield piece
    if digest is not None and digest.digest() != parse_digest(descriptor.digest):
        raise IntegrityError(f"blob {descriptor.digest} of {label} has other content than its digest says")


# -- blobs on their way


@dataclass(frozen=True, slots=True)
class _Pending:
    digest: str
    file: FileWriter
    done: Future[None]


class _Uploads:
    """Uploads in the background, bounded in number. The first failure is raised by whatever is called next."""

    def __init__(self, uploader: Uploader) -> None:
        self._uploader = uploader
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[_Pending] = deque()
        self._cancelled: set[str] = set()

    def submit(self, descriptor: Descriptor, file: FileWriter) -> None:
        """Upload a file and close it; waits while there are too many already. Raises: what an earlier upload raised."""
        self._reduce(_MAX_PENDING - 1)
        self._pool = self._pool or ThreadPoolExecutor(_MAX_PENDING, thread_name_prefix="upload")
        self._pending.append(_Pending(descriptor.digest, file, self._pool.submit(self._upload, descriptor, file)))

    def wait(self) -> None:
        """Raises: what an upload raised."""
        self._reduce(0)

    def _reduce(self, count: int) -> None:
        while len(self._pending) > count:
            self._pending.popleft().done.result()

    def _upload(self, descriptor: Descriptor, file: FileWriter) -> None:
        def stream(offset: int) -> Iterator[bytes]:
            for position in range(offset, descriptor.size, _READ_SIZE):
                if descriptor.digest in self._cancelled:
                    raise TransportError(f"the upload of {descriptor.digest} was cancelled")
                yield file.read_back(position, min(_READ_SIZE, descriptor.size - position))

        with contextlib.closing(file):
            self._uploader.upload(descriptor, stream, lambda size: None)

    def cancel(self, digest: str) -> None:
        """End one upload, if it is under way."""
        for item in [item for item in self._pending if item.digest == digest]:
            self._end(item)

    def close(self) -> None:
        """End all of them."""
        for item in list(self._pending):
            self._end(item)
        if self._pool is not None:
            self._pool.shutdown()

    def _end(self, item: _Pending) -> None:
        self._cancelled.add(item.digest)
        self._pending.remove(item)
        if item.done.cancel():
            item.file.close()
        else:
            with contextlib.suppress(EncfsError):
                item.done.result()


class SpooledWriter:
    """A `BlobWriter` that keeps the blob in a temporary file until it is uploaded."""

    def __init__(self, uploads: _Uploads, directory: str) -> None:
        """Raises: StorageError."""
        self._uploads = uploads
        with storage_errors(directory):
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._file: FileWriter | None = FileWriter(self._directory, directory)
        except BaseException:
            os.close(self._directory)
            raise

    def write(self, data: Buffer) -> None:
        """Raises: StorageError."""
        assert self._file is not None  # noqa: S101 - not after commit or abort
        self._file.write(data)

    def digest(self) -> str:
        assert self._file is not None  # noqa: S101
        return f"sha256:{self._file.hexdigest()}"

    def commit(self, media_type: str) -> Descriptor:
        """Hand the blob over to its upload; `put_manifest` waits for it. Raises: what an earlier upload raised."""
        assert self._file is not None  # noqa: S101
        descriptor = Descriptor(media_type, self.digest(), self._file.position)
        self._uploads.submit(descriptor, self._file)
        self._file = None
        self.abort()
        return descriptor

    def abort(self) -> None:
        """Throw away what was not committed; harmless when called again."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


# -- documents


def parse_index(content: bytes) -> list[Descriptor]:
    """The descriptors of an untrusted image index, at most 1,024. Raises: FormatError."""
    index = loads_object(content, limit=MAX_MANIFEST_SIZE, what="image index")
    # Registries that are written in Go have null for an empty list.
    entries = [] if "manifests" in index and index["manifests"] is None else index.get("manifests")
    if not isinstance(entries, list):
        raise FormatError("the image index has no list of manifests")
    return [_parse_descriptor(item) for item in entries[:_MAX_REFERRERS]]


def _parse_descriptor(value: object) -> Descriptor:
    if not isinstance(value, dict):
        raise FormatError("an entry of the image index is not an object")
    media_type, size, artifact_type = value.get("mediaType"), value.get("size"), value.get("artifactType")
    annotations = value.get("annotations") or {}
    parse_digest(value.get("digest"), "a digest of the image index")
    if not isinstance(media_type, str) or isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise FormatError("an entry of the image index has no media type or size")
    if not isinstance(annotations, dict) or not isinstance(artifact_type, str | None):
        raise FormatError("an entry of the image index has odd annotations or an odd artifact type")
    strings = {name: text for name, text in annotations.items() if isinstance(text, str)}
    return Descriptor(media_type, str(value["digest"]), size, artifact_type, strings)


def _artifact_type(manifest: dict[str, Any]) -> str | None:
    """What a manifest says it is, as lists of referrers have it (distribution-spec, "Listing Referrers")."""
    config = manifest.get("config")
    stated = manifest.get("artifactType") or (config.get("mediaType") if isinstance(config, dict) else None)
    return stated if isinstance(stated, str) else None


def _descriptor_document(descriptor: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
    }
    if descriptor.artifact_type:
        document["artifactType"] = descriptor.artifact_type
    if descriptor.annotations:
        document["annotations"] = dict(descriptor.annotations)
    return document
