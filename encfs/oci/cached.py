"""A registry behind the ciphertext cache, as a source of artifacts: what was fetched once is there when it is gone.

Manifests, descriptors, keyrings and signatures are kept whole, by digest; trees and segments as far as they were read.
What a tag means is asked of the registry every time; the last answer counts only while no answer is to be had, and
whether an artifact is accepted is decided by the trust rules in any case. Not here: files of the cache (`cache`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from encfs.errors import AuthenticationError, FormatError, StorageError, TransportError, UnsupportedError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor, RawManifest
from encfs.oci.cache import Cache, Tag, open_cache
from encfs.oci.cachedblob import CachedBlob
from encfs.oci.counters import TransferCounters
from encfs.oci.fetcher import Fetcher
from encfs.oci.fetching import FetchingBlob
from encfs.oci.options import StoreOptions, default_cache_dir
from encfs.oci.reference import DEFAULT_TAG, Reference
from encfs.oci.referrers import INDEX_TYPE
from encfs.oci.registry import MANIFEST_TYPE, Registry
from encfs.oci.remote import RangeBlob
from encfs.strictjson import loads_object

if TYPE_CHECKING:
    from encfs.oci.mirrors import Upstream

log = logging.getLogger(__name__)


class CachedSource:
    """A `BlobSource`. Thread-safe."""

    def __init__(self, reference: Reference, options: StoreOptions | None = None) -> None:
        """No request is made yet. Raises: UsageError, StorageError where the cache directory cannot be used."""
        self.options = options or StoreOptions()
        self.reference = reference
        #: The registry itself.
        self.origin = Registry(reference, self.options)
        #: What was transferred, by mirrors as well.
        self.counters: TransferCounters = self.origin.client.counters
        #: The same, its mirrors asked first.
        self._upstream: Upstream = self.origin
        if self.options.mirrors:
            # Imported here: most have none, and to load it takes time before the first byte.
            from encfs.oci.mirrors import MirroredRegistry

            self._upstream = MirroredRegistry(self.origin)
        self.fetcher = Fetcher(self.options.concurrency, self.options.io_timeout, self.counters)
        # Last: it has files open, and the others may refuse what they are told.
        self.cache = _open_cache(self.options)

    def __str__(self) -> str:
        return str(self.origin)

    # -- documents

    def manifest(self, reference: str | None = None) -> RawManifest:
        """As `Registry.manifest`; from the cache where it is named by its digest, or the registry cannot be reached.

        Raises: NotFoundError, UnsupportedError for an index, IntegrityError, TransportError, AuthenticationError.
        """
        manifest = self.document(reference)
        if manifest.media_type not in (INDEX_TYPE,) and "manifest.list" not in manifest.media_type:
            return manifest
        raise UnsupportedError(f"{self}: {manifest.digest} is an image index", hint="name one manifest by its digest")

    def document(self, reference: str | None = None) -> RawManifest:
        """The same, an image index as well."""
        name = reference or self.reference.digest
        if name is not None and name.startswith("sha256:"):
            return self._document_by_digest(name)
        try:
            document = self._upstream.document(name)
        except AuthenticationError:
            raise
        except TransportError as error:
            known = self._last_known(name, error)
            if known is None:
                raise
            return known
        if self.cache is not None:
            self.cache.write_document(document.content)
            self.cache.write_tag(Tag(self._full_name(name), document.digest))
        return document

    def _document_by_digest(self, digest: str) -> RawManifest:
        content = self.cache.read_document(digest, MAX_MANIFEST_SIZE) if self.cache is not None else None
        if content is not None:
            return RawManifest(content, digest, _media_type(content))
        document = self._upstream.document(digest)
        if self.cache is not None:
            self.cache.write_document(document.content)
        return document

    def _last_known(self, tag: str | None, error: TransportError) -> RawManifest | None:
        if self.cache is None:
            return None
        known = self.cache.read_tag(self._full_name(tag))
        content = self.cache.read_document(known.digest, MAX_MANIFEST_SIZE) if known is not None else None
        if known is None or content is None:
            return None
        log.warning(
            "%s; taking %s for %s, as it was when the registry was last reached",
            error.message,
            known.digest,
            known.reference,
        )
        return RawManifest(content, known.digest, _media_type(content))

    def _full_name(self, tag: str | None) -> str:
        return f"docker://{self.origin}:{tag or self.reference.tag or DEFAULT_TAG}"

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """A small blob whole, verified. Raises: as `Registry.read_blob`."""
        if descriptor.size > limit:
            raise FormatError(f"blob {descriptor.digest} has {descriptor.size} bytes, more than the {limit} allowed")
        if self.cache is not None:
            content = self.cache.read_document(descriptor.digest, limit)
            if content is not None and len(content) == descriptor.size:
                return content
        content = self._upstream.read_blob(descriptor, limit=limit)
        if self.cache is not None:
            self.cache.write_document(content)
        return content

    # -- blobs

    def open_blob(self, descriptor: Descriptor) -> FetchingBlob:
        """Random access; nothing is fetched or verified yet. Raises: FormatError."""
        return FetchingBlob(self.remote_blob(descriptor), self.cached_blob(descriptor), self.fetcher)

    def cached_blob(self, descriptor: Descriptor) -> CachedBlob | None:
        """What the cache has of a blob; None without a cache. Raises: FormatError."""
        return None if self.cache is None else CachedBlob(self.cache, descriptor.digest, descriptor.size)

    def remote_blob(self, descriptor: Descriptor) -> RangeBlob:
        """A blob past the cache. Raises: FormatError."""
        return self._upstream.open_blob(descriptor)

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """As `Registry.stream_blob`: past the cache, which serves reading in parts."""
        return self._upstream.stream_blob(descriptor, chunk_size=chunk_size, offset=offset, verify=verify)

    def has_blob(self, descriptor: Descriptor) -> bool:
        """Whether the registry has it. Raises: TransportError, AuthenticationError."""
        return self.origin.has_blob(descriptor)

    def referrers(self, digest: str, artifact_type: str | None = None) -> list[Descriptor]:
        """As `Registry.referrers`."""
        return self.origin.referrers(digest, artifact_type)

    def close(self) -> None:
        """End what is under way. Harmless when called again."""
        self._upstream.close()
        self.fetcher.close()
        if self.cache is not None:
            self.cache.close()


def _open_cache(options: StoreOptions) -> Cache | None:
    """The cache that the options ask for; where it is the default one and cannot be used, none, and that is said."""
    if options.cache_dir is None or options.cache_size <= 0:
        return None
    try:
        return open_cache(options.cache_dir, options.cache_size)
    except StorageError as error:
        if options.cache_dir != default_cache_dir():
            raise
        log.warning("%s; going on without a cache", error.message)
        return None


def _media_type(content: bytes) -> str:
    """What a manifest or index says it is; it was accepted by its digest."""
    document = loads_object(content, limit=MAX_MANIFEST_SIZE, what="manifest")
    stated = document.get("mediaType")
    return stated if isinstance(stated, str) else (INDEX_TYPE if "manifests" in document else MANIFEST_TYPE)
