"""A repository in a registry (OCI distribution-spec) as a source and a sink of blobs.

Constant memory whatever the sizes. What is written without a known digest goes through a temporary file first, and is
uploaded from there while the next blob is written: an interrupted upload can then be resumed, and an encrypted frame is
never made twice. Not here: single requests (`client`), ranges of blobs (`remote`), uploads (`upload`, `spooling`),
lists of referrers (`referrers`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from encfs.encoding import parse_digest, sha256_digest
from encfs.errors import (
    FormatError,
    IntegrityError,
    NotFoundError,
    TransportError,
    UnsupportedError,
)
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor, RawManifest
from encfs.oci.client import Client
from encfs.oci.counters import TransferCounters
from encfs.oci.http import content_length, resolve, status_error
from encfs.oci.options import StoreOptions
from encfs.oci.reference import DEFAULT_TAG, Reference, check_registry_tag
from encfs.oci.referrers import INDEX_TYPE, MAX_REFERRERS, list_with, parse_index, referrers_tag, subject_of
from encfs.oci.remote import RangeBlob, RemoteBlob
from encfs.oci.spooling import SpooledWriter, UploadQueue
from encfs.oci.upload import Uploader
from encfs.strictjson import loads_object, show_name

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
_DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
_ACCEPT = ", ".join((MANIFEST_TYPE, _DOCKER_MANIFEST_TYPE, INDEX_TYPE, _DOCKER_INDEX_TYPE))
_SUCCESS = frozenset({200})
_STORED = frozenset({200, 201, 202})

_MAX_REFERRER_PAGES = 16


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
        self._uploads = UploadQueue(self._uploader)
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
            if not link or len(found) >= MAX_REFERRERS:
                break
            url = resolve(response.url, link)
        return [item for item in found if artifact_type in (None, item.artifact_type)][:MAX_REFERRERS]

    def _tagged_referrers(self, digest: str) -> list[Descriptor]:
        """The list kept under a tag where the registry has no referrers API ("Referrers Tag Schema")."""
        try:
            return parse_index(self._fetch_manifest(referrers_tag(digest), INDEX_TYPE).content)
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
        digest = subject_of(manifest)
        if digest is None:
            return
        listed = self._tagged_referrers(digest)
        if any(item.digest == descriptor.digest for item in listed):
            return
        self.client.request(
            self.client.url("manifests", referrers_tag(digest)),
            "PUT",
            f"the list of referrers of {digest}",
            _STORED,
            data=list_with(listed, descriptor, manifest),
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
