"""Copy an image between two stores with some of its layers made anew: one manifest, or an index of several platforms.

Manifests are written last, an index behind them, and the tag is moved by that. On failure the blobs that were written
are taken back, so that there is the whole result or what was there before. Not here: what is done with a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from encfs.errors import EncfsError, FormatError, UnsupportedError, UsageError
from encfs.image.config import MAX_CONFIG_SIZE, ImageConfig, parse_image_config
from encfs.image.manifest import (
    CONFIG_TYPES,
    INDEX_TYPE,
    INDEX_TYPES,
    MANIFEST_TYPE,
    ImageIndex,
    ImageManifest,
    IndexEntry,
    Platform,
    chosen_entries,
    parse_image,
    parse_image_manifest,
)
from encfs.image.mediatypes import LAYER_TYPES
from encfs.oci.blobs import BlobSource, BlobTarget, BlobWriter, Descriptor
from encfs.oci.options import DEFAULT_CONCURRENCY
from encfs.oci.transfer import copy_blobs
from encfs.progress import Progress

#: Makes the descriptors of all layers of one image, those that stay as they are among them.
Rewrite = Callable[[ImageManifest], Sequence[Descriptor]]


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What was written: the manifest or index, the images in it, layers that were made anew and their bytes.

    `dropped` are entries of an index that described others (attestations), and would be about bytes that are not there.
    """

    descriptor: Descriptor
    images: int
    layers: int
    size: int
    dropped: int


class Rewriter:
    """One copy between two stores, which may be the same."""

    def __init__(
        self, source: BlobSource, sink: BlobTarget, progress: Progress, *, concurrency: int = DEFAULT_CONCURRENCY
    ) -> None:
        self.source = source
        self.progress = progress
        self._sink = sink
        self._concurrency = concurrency
        self._written: list[Descriptor] = []
        self._layers = 0
        self._size = 0

    def run(self, rewrite: Rewrite, *, tag: str | None, platforms: Sequence[Platform] = ()) -> ImageResult:
        """Rewrite the image, or those of an index's images that are for `platforms` (none: all).

        With exactly one platform the result is a manifest and no index.

        Raises: UsageError for a platform that is not there; UnsupportedError, FormatError, IntegrityError; what
        `rewrite` and the stores raise.
        """
        try:
            return self._run(rewrite, tag, platforms)
        except BaseException:
            for blob in self._written:
                # Why it failed is what the caller has to hear.
                with contextlib.suppress(EncfsError):
                    self._sink.remove_blob(blob)
            raise
        finally:
            self.progress.end()

    def config(self, manifest: ImageManifest) -> ImageConfig | None:
        """The image's config; None where the manifest is of some other artifact. Raises: FormatError, and others."""
        if manifest.config.media_type not in CONFIG_TYPES:
            return None
        config = parse_image_config(self.source.read_blob(manifest.config, limit=MAX_CONFIG_SIZE))
        if len(config.diff_ids) != len(manifest.layers):
            raise FormatError(f"the image has {len(manifest.layers)} layers, and its config {len(config.diff_ids)}")
        return config

    @contextmanager
    def new_layer(self) -> Iterator[NewLayer]:
        """A layer to write; it is thrown away unless it is committed."""
        writer = self._sink.create_blob()
        try:
            yield NewLayer(writer, self._commit)
        finally:
            writer.abort()

    def _commit(self, writer: BlobWriter, size: int, media_type: str) -> Descriptor:
        expected = Descriptor(media_type, writer.digest(), size)
        if not self._sink.has_blob(expected):
            # Noted first: an interrupt may come when it is written, but before its descriptor is here.
            self._written.append(expected)
        descriptor = writer.commit(media_type)
        self._layers += 1
        self._size += descriptor.size
        return descriptor

    def _run(self, rewrite: Rewrite, tag: str | None, platforms: Sequence[Platform]) -> ImageResult:
        raw = self.source.document()
        image = parse_image(raw)
        if isinstance(image, ImageManifest):
            self._check_platform(image, platforms)
            content = self._rewritten(image, rewrite)
            return self._result(self._sink.put_manifest(content, MANIFEST_TYPE, tag=tag), 1, 0)
        entries = chosen_entries(image, platforms)
        if not entries:
            raise FormatError("the image index names no image")
        if len(platforms) == 1 and len(entries) == 1:
            content = self._rewritten(self._manifest(entries[0]), rewrite)
            return self._result(self._sink.put_manifest(content, MANIFEST_TYPE, tag=tag), 1, 0)
        return self._rewrite_index(image, entries, rewrite, tag)

    def _rewrite_index(
        self, index: ImageIndex, entries: Sequence[IndexEntry], rewrite: Rewrite, tag: str | None
    ) -> ImageResult:
        replaced: dict[str, Descriptor] = {}
        # All of them are parsed before the first is worked on.
        manifests = {entry.descriptor.digest: self._manifest(entry) for entry in entries}
        for digest, manifest in manifests.items():
            replaced[digest] = self._sink.write_manifest(self._rewritten(manifest, rewrite), MANIFEST_TYPE)
        descriptor = self._sink.put_manifest(index.rewritten(replaced), INDEX_TYPE, tag=tag)
        return self._result(descriptor, len(replaced), sum(entry.is_attestation for entry in index.entries))

    def _result(self, descriptor: Descriptor, images: int, dropped: int) -> ImageResult:
        return ImageResult(descriptor, images, self._layers, self._size, dropped)

    def _manifest(self, entry: IndexEntry) -> ImageManifest:
        if entry.descriptor.media_type in INDEX_TYPES:
            raise UnsupportedError("the image index has another index in it", hint="name one image by its digest")
        raw = self.source.document(entry.descriptor.digest)
        return parse_image_manifest(raw.content, entry.descriptor.media_type)

    def _check_platform(self, manifest: ImageManifest, platforms: Sequence[Platform]) -> None:
        if not platforms:
            return
        config = self.config(manifest)
        if config is None:
            raise UsageError("it is no image of a platform", hint="leave --platform out")
        present = Platform(config.os, config.architecture, config.variant)
        if not any(present.matches(platform) for platform in platforms):
            raise UsageError(f"the image is for {present} alone", hint="leave --platform out")

    def _rewritten(self, manifest: ImageManifest, rewrite: Rewrite) -> bytes:
        layers = rewrite(manifest)
        kept = [layer for layer, old in zip(layers, manifest.layers, strict=True) if layer.digest == old.digest]
        copy_blobs(
            self.source, self._sink, [manifest.config, *kept], progress=self.progress, concurrency=self._concurrency
        )
        return manifest.rewritten([_in_oci_words(layer) for layer in layers])


class NewLayer:
    """One layer being written."""

    def __init__(self, writer: BlobWriter, commit: Callable[[BlobWriter, int, str], Descriptor]) -> None:
        self._writer = writer
        self._commit = commit
        self._size = 0

    def write(self, data: bytes) -> None:
        self._writer.write(data)
        self._size += len(data)

    def digest(self) -> str:
        return self._writer.digest()

    def commit(self, media_type: str) -> Descriptor:
        return self._commit(self._writer, self._size, media_type)


def _in_oci_words(layer: Descriptor) -> Descriptor:
    known = LAYER_TYPES.get(layer.media_type)
    return layer if known is None else replace(layer, media_type=known.oci)
