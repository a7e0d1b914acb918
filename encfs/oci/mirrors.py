"""Mirrors in front of a registry: tried first for whatever is named by its digest, never relied on.

A mirror is a host that nobody vouches for. It gets no credential of the registry and little time; one that fails, is
slow or lies is left alone for a while, and what it did not give comes from the registry. Which artifact a tag means is
asked of the registry itself: a mirror may be stale, and is asked only where the registry cannot be reached
(docs/registries.md). Not here: how one registry is spoken to (`registry`, `remote`), what is kept (`cached`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from encfs.errors import AuthenticationError, EncfsError, IntegrityError, NotFoundError, TransportError, UsageError
from encfs.oci.blobs import Descriptor, RawManifest
from encfs.oci.reference import DEFAULT_TAG, Reference, is_host, parse_reference
from encfs.oci.registry import Registry, stream_in_order
from encfs.oci.remote import RangeBlob, fill
from encfs.strictjson import show_name

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

#: A mirror's silence (seconds) after which the registry is asked instead.
_PATIENCE = 4.0
#: A mirror whose bodies arrive more slowly than this (bytes/second) is left; judged after `_JUDGE_SECONDS` of waiting.
_SLOWEST = 256 << 10
_JUDGE_SECONDS = 2.0
#: Seconds for which a mirror is left alone after a failure, doubled by each further one up to the longest.
_FIRST_REST = 15.0
_LONGEST_REST = 600.0
#: Seconds for which a mirror that had no such blob, or wrong bytes of it, is not asked for that blob.
_BLOB_REST = 600.0
#: Blobs whose bad sources are remembered.
_MAX_REMEMBERED = 4096
#: Attempts to ask the registry what a tag means where mirrors could be asked instead.
_TAG_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Mirror:
    """Where a mirror is: `host` with an optional port, and what stands before the name of each repository."""

    host: str
    prefix: str = ""
    plain_http: bool = False

    def __str__(self) -> str:
        return f"{self.host}/{self.prefix}" if self.prefix else self.host

    def reference(self, origin: Reference) -> Reference:
        """The mirror's copy of what a reference names. Raises: UsageError where that is no repository's name."""
        repository = f"{self.prefix}/{origin.repository}" if self.prefix else origin.repository
        return replace(parse_reference(f"docker://{self.host}/{repository}"), tag=origin.tag, digest=origin.digest)


def parse_mirror(text: str, *, plain_http: bool) -> Mirror:
    """`HOST[:PORT][/PREFIX]`, or an http or https URL of that; `plain_http` is for those without a scheme.

    Raises: UsageError.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        scheme, rest = "http" if plain_http else "https", text
    host, _, prefix = rest.rstrip("/").partition("/")
    hint = "write HOST[:PORT][/PREFIX], or http://… where that is meant"
    if scheme.lower() not in ("http", "https"):
        raise UsageError(f"{show_name(text)} is no mirror: {show_name(scheme)} is not http or https", hint=hint)
    if not is_host(host):
        raise UsageError(f"{show_name(text)} is no mirror: it has a malformed host", hint=hint)
    mirror = Mirror(host, prefix, scheme.lower() == "http")
    try:
        mirror.reference(Reference("docker", registry=host, repository="x"))
    except UsageError:
        raise UsageError(f"{show_name(text)} is no mirror: it has a malformed prefix", hint=hint) from None
    return mirror


class Upstream(Protocol):
    """What can be read by digest, and what a tag means: a registry, with or without mirrors. Thread-safe."""

    def document(self, reference: str | None = None) -> RawManifest: ...

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes: ...

    def open_blob(self, descriptor: Descriptor) -> RangeBlob: ...

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]: ...

    def close(self) -> None: ...


class _Place:
    """A mirror, or the registry itself, as a place to read from, and what is known of it. Thread-safe."""

    def __init__(self, registry: Registry, *, name: str = "") -> None:
        """`name`: of a mirror."""
        self.registry = registry
        self.name = name
        self._lock = threading.Lock()
        self._resting_until = 0.0
        self._failures = 0
        self._without: dict[str, float] = {}

    @property
    def is_mirror(self) -> bool:
        return bool(self.name)

    def is_fit(self, digest: str) -> bool:
        """Whether to ask it for a blob before the registry."""
        now = time.monotonic()
        return now >= self._resting_until and not self.lacks(digest)

    def lacks(self, digest: str) -> bool:
        """Whether it is known to have no such blob, or a wrong one."""
        return time.monotonic() < self._without.get(digest, 0.0)

    def served(self) -> None:
        self._failures = 0

    def failed(self, digest: str, error: EncfsError) -> None:
        """Remember a failure of a mirror, of this blob alone or altogether."""
        now = time.monotonic()
        with self._lock:
            if isinstance(error, NotFoundError | IntegrityError):
                if len(self._without) >= _MAX_REMEMBERED:
                    self._without.clear()
                self._without[digest] = now + _BLOB_REST
            if isinstance(error, NotFoundError) or now < self._resting_until:
                # What is not mirrored is no fault, and requests that fail side by side are one failure.
                log.debug("mirror %s: %s", self.name, error.message)
                return
            lied = isinstance(error, IntegrityError)
            rest = _LONGEST_REST if lied else min(_LONGEST_REST, _FIRST_REST * 2.0**self._failures)
            self._resting_until = now + rest
            self._failures = min(self._failures + 1, 10)
        log.warning("mirror %s: %s; not asked for %.0f seconds", self.name, error.message, rest)


@dataclass(slots=True)
class _Trail:
    """Which place a blob's bytes came from last, and until when no mirror is asked for them before the registry."""

    last: _Place | None = None
    distrusted_until: float = 0.0


class MirroredRegistry:
    """Reads from mirrors first, from the registry otherwise. Thread-safe."""

    def __init__(self, origin: Registry) -> None:
        """No request is made yet. Raises: UsageError where a mirror's name is malformed."""
        self._origin = _Place(origin)
        self._mirrors = tuple(_open_mirrors(origin))
        self._lock = threading.Lock()
        self._trails: dict[str, _Trail] = {}

    def __str__(self) -> str:
        return str(self._origin.registry)

    def document(self, reference: str | None = None) -> RawManifest:
        """As `Registry.document`: a digest of the mirrors first, a tag of the registry first."""
        name = reference or self._origin.registry.reference.digest
        if name is not None and name.startswith("sha256:"):
            digest = name
            return self._first(digest, lambda place: place.registry.document(digest))
        return self._resolve(name)

    def _resolve(self, tag: str | None) -> RawManifest:
        try:
            return self._origin.registry.document(tag, attempts=_TAG_ATTEMPTS)
        except AuthenticationError:
            raise
        except TransportError as error:
            for mirror in self._mirrors:
                try:
                    document = mirror.registry.document(tag)
                except EncfsError as problem:
                    log.debug("mirror %s: %s", mirror.name, problem.message)
                    continue
                shown = tag or self._origin.registry.reference.tag or DEFAULT_TAG
                log.warning("%s; taking %s for %s, as %s says", error.message, document.digest, shown, mirror.name)
                return document
            raise

    def read_blob(self, descriptor: Descriptor, *, limit: int) -> bytes:
        """As `Registry.read_blob`."""
        return self._first(descriptor.digest, lambda place: place.registry.read_blob(descriptor, limit=limit))

    def _first(self, digest: str, ask: Callable[[_Place], _Result]) -> _Result:
        """The answer of the first place that has one; what it answers is verified by `ask`."""
        failure: EncfsError | None = None
        for place in self.places(digest):
            try:
                answer = ask(place)
            except EncfsError as error:
                # What the registry itself says counts for more than what mirrors say.
                failure = self.blame(place, digest, error, failure)
            else:
                place.served()
                return answer
        assert failure is not None  # noqa: S101 - the registry is always among the places
        raise failure

    def places(self, digest: str) -> Iterator[_Place]:
        """Where to look for a blob, in this order: fit mirrors, the registry, other mirrors that may have it."""
        distrusted = time.monotonic() < self.trail(digest).distrusted_until
        first = [] if distrusted else [mirror for mirror in self._mirrors if mirror.is_fit(digest)]
        yield from first
        yield self._origin
        yield from (mirror for mirror in self._mirrors if mirror not in first and not mirror.lacks(digest))

    def blame(self, place: _Place, digest: str, error: EncfsError, failure: EncfsError | None) -> EncfsError:
        """Remember what a place did; the error to raise if no other place does better than it and `failure`'s."""
        if not place.is_mirror:
            return error
        place.failed(digest, error)
        return failure or error

    def trail(self, digest: str) -> _Trail:
        """What is known of a blob's way here, shared by all who read it."""
        with self._lock:
            trail = self._trails.get(digest)
            if trail is None:
                if len(self._trails) >= _MAX_REMEMBERED:
                    self._trails.clear()
                trail = self._trails[digest] = _Trail()
            return trail

    def open_blob(self, descriptor: Descriptor) -> MirroredBlob:
        """Random access; nothing is fetched or verified yet. Raises: FormatError."""
        return MirroredBlob(self, descriptor)

    def stream_blob(
        self, descriptor: Descriptor, *, chunk_size: int = 1 << 20, offset: int = 0, verify: bool = True
    ) -> Iterator[bytes]:
        """As `Registry.stream_blob`. After an IntegrityError, `discard` of the opened blob has another place asked."""
        return stream_in_order(self.open_blob(descriptor), descriptor, str(self), offset=offset, verify=verify)

    def close(self) -> None:
        """End what is under way. Harmless when called again."""
        for mirror in self._mirrors:
            mirror.registry.close()
        self._origin.registry.close()


class MirroredBlob:
    """Random access to one blob, wherever it is to be had. Thread-safe."""

    def __init__(self, registry: MirroredRegistry, descriptor: Descriptor) -> None:
        self.size = descriptor.size
        self._registry = registry
        self._descriptor = descriptor
        self._opened: dict[_Place, RangeBlob] = {}

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Raises: as `Blob.read_into`."""
        if buffer:
            fill(self.pieces(offset, len(buffer)), offset, buffer)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Nothing of a registry is ever at hand."""
        return not buffer

    def pieces(self, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
        """As `RangeBlob.pieces`: where one place fails in the middle, the next one goes on."""
        digest, done, end = self._descriptor.digest, offset, offset + size
        failure: EncfsError | None = None
        for place in self._registry.places(digest):
            chunks = self._blob(place).pieces(done, end - done)
            if place.is_mirror:
                chunks = _not_too_slow(chunks)
            try:
                for position, chunk in chunks:
                    self._registry.trail(digest).last = place
                    yield position, chunk
                    done = max(done, position + len(chunk))
            except EncfsError as error:
                failure = self._registry.blame(place, digest, error, failure)
            else:
                place.served()
                return
            if done >= end:
                return
        assert failure is not None  # noqa: S101 - the registry is always among the places
        raise failure

    def _blob(self, place: _Place) -> RangeBlob:
        opened = self._opened.get(place)
        return (
            opened if opened is not None else self._opened.setdefault(place, place.registry.open_blob(self._descriptor))
        )

    def discard(self, offset: int, size: int) -> bool:
        """These bytes did not verify: for a while the registry itself is asked for the blob before its mirrors."""
        trail = self._registry.trail(self._descriptor.digest)
        trail.distrusted_until = time.monotonic() + _BLOB_REST
        if trail.last is not None and trail.last.is_mirror:
            trail.last.failed(self._descriptor.digest, IntegrityError(f"wrong bytes of {self._descriptor.digest}"))
            trail.last = None
        return True

    def close(self) -> None:
        """The connections belong to the registries."""


def _open_mirrors(origin: Registry) -> Iterator[_Place]:
    options = origin.options
    mirrors = [parse_mirror(text, plain_http=options.plain_http) for text in options.mirrors]
    patience = min(_PATIENCE, options.io_timeout / 4)
    # The client certificate is the registry's credential, too.
    stranger = replace(options, mirrors=(), cert_file=None, key_file=None, io_timeout=patience)
    for mirror in dict.fromkeys(mirrors):
        reference = mirror.reference(origin.reference)
        registry = Registry(
            reference, stranger, plain_http=mirror.plain_http, attempts=1, counters=origin.client.counters
        )
        yield _Place(registry, name=str(mirror))


def _not_too_slow(pieces: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The same, as long as they arrive fast enough; only the time that is spent waiting for them counts.

    Raises: TransportError where they do not.
    """
    size = 0
    waited = 0.0
    while True:
        started = time.monotonic()
        piece = next(pieces, None)
        waited += time.monotonic() - started
        if piece is None:
            return
        yield piece
        size += len(piece[1])
        if waited > _JUDGE_SECONDS and size < waited * _SLOWEST:
            raise TransportError(f"it sends too slowly: {size} bytes in {waited:.0f} seconds")
