"""Encrypt container images: a volume for each layer, and one more with what gives its tar archive back.

Layers are read once, as streams: decompressed, hashed, taken apart and sealed on the way. An index of platforms becomes
an index of artifacts. Not here: where images come from (`imagetool.sources.image`), what a layer is (`imagetool.tar`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest

from encfs.artifact import Artifact
from encfs.erofs.writer import ErofsWriter
from encfs.errors import EncfsError, IntegrityError, StorageError, UnsupportedError
from encfs.format.descriptor import ARTIFACT_TYPE, MANIFEST_TYPE, MAX_VOLUMES, ContentDescriptor
from encfs.format.writer import VolumeOptions, VolumeWriter, WrittenVolume
from encfs.image.artifact import AUXILIARY_PREFIX, FLAT_NAME, LAYER_PREFIX
from encfs.image.manifest import INDEX_TYPE, Platform
from encfs.keys.jwk import PrivateKey
from encfs.keys.recipients import RecipientKey
from encfs.oci.blobs import BlobTarget, Descriptor
from encfs.oci.options import DEFAULT_CONCURRENCY
from encfs.progress import Progress
from encfs.tar.reader import TarReader
from imagetool.pipeline.publish import IMAGE_UUID, ArtifactOptions, TrackedSink, check_options, write_documents
from imagetool.pipeline.reuse import TakenLayer, take_layers
from imagetool.sources.image import SourceImage, SourceImages
from imagetool.tar.below import DirectoriesBelow
from imagetool.tar.flatten import FlattenPlan
from imagetool.tar.layer import write_layer
from imagetool.tar.recipe import RecipeWriter
from imagetool.tar.stream import ByteStream


@dataclass(frozen=True, slots=True)
class ImageOptions(ArtifactOptions):
    """`max_layer_size`: bytes that a layer may unpack to (None: `encfs.image.compression.allowed_size`); `concurrency`:
    blobs that are copied at a time where they are taken over; `flatten`: one volume of all layers."""

    max_layer_size: int | None = None
    flatten: bool = False
    concurrency: int = DEFAULT_CONCURRENCY


@dataclass(frozen=True, slots=True)
class EncryptedImage:
    """The artifact of one platform; `reused` layers of all."""

    platform: Platform
    content: ContentDescriptor
    manifest: Descriptor
    layers: int
    reused: int


@dataclass(frozen=True, slots=True)
class ImagesResult:
    """What was made: `manifest` is what the tag names, an index where several were asked for. Sizes in bytes."""

    manifest: Descriptor
    images: tuple[EncryptedImage, ...]
    is_index: bool
    source_size: int
    stored_size: int
    seconds: float


def encrypt_images(
    source: SourceImages,
    sink: BlobTarget,
    recipients: Sequence[RecipientKey],
    *,
    signers: Sequence[PrivateKey] = (),
    options: ImageOptions,
    tag: str | None,
    progress: Progress,
    earlier: Sequence[Artifact | None] = (),
) -> ImagesResult:
    """Encrypt for all `recipients`; the tag is moved last, and on failure what was written is taken back.

    `earlier` has for each image an artifact whose layers are taken over where they are the same; their blobs, which are
    no secret to anybody new, stay at the destination on failure.
    Raises: UsageError, MissingKeyError; SourceError and FormatError naming the layer, IntegrityError where one is not
    of its diff ID; what the stores raise.
    """
    started = time.monotonic()
    check_options(options, recipients)
    # One line of releases for all platforms.
    options = replace(options, artifact_id=options.artifact_id or secrets.token_hex(16))
    tracked = TrackedSink(sink)
    made: list[EncryptedImage] = []
    try:
        for image, former in zip_longest(source.images, earlier):
            taken = (
                {}
                if former is None
                else take_layers(
                    former, image.parsed.diff_ids, options.volume.suite, sink, progress, options.concurrency
                )
            )
            if options.flatten:
                volumes = [_write_flat(image, tracked, options, progress)]
            else:
                volumes = _write_layers(image, tracked, options, progress, taken)
            content, document = write_documents(
                volumes, tracked, recipients, signers, options, image_config=image.config
            )
            if source.is_index:
                manifest = tracked.write_manifest(document, MANIFEST_TYPE)
            else:
                manifest = tracked.put_manifest(document, MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE)
            made.append(EncryptedImage(image.platform, content, manifest, len(image.layers), len(taken)))
        if source.is_index:
            manifest = tracked.put_manifest(_index(made), INDEX_TYPE, tag=tag)
    except BaseException:
        tracked.take_back()
        raise
    finally:
        progress.end()
    return ImagesResult(
        manifest=manifest,
        images=tuple(made),
        is_index=source.is_index,
        source_size=sum(image.size for image in source.images),
        stored_size=tracked.size + manifest.size,
        seconds=time.monotonic() - started,
    )


def _index(images: Sequence[EncryptedImage]) -> bytes:
    """An index without artifact types: some tools rewrite one that has them, and with it its digest."""
    manifests = []
    for image in images:
        platform = {"architecture": image.platform.architecture, "os": image.platform.os}
        if image.platform.variant:
            platform["variant"] = image.platform.variant
        manifests.append(
            {
                "mediaType": image.manifest.media_type,
                "digest": image.manifest.digest,
                "size": image.manifest.size,
                "platform": platform,
            }
        )
    document = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}
    return json.dumps(document, separators=(",", ":")).encode()


def _write_layers(
    image: SourceImage,
    sink: TrackedSink,
    options: ImageOptions,
    progress: Progress,
    taken: Mapping[str, TakenLayer],
) -> list[WrittenVolume]:
    if len(image.layers) * 2 > MAX_VOLUMES:
        raise UnsupportedError(
            f"the image has {len(image.layers)} layers, an artifact holds {MAX_VOLUMES // 2} at most"
        )
    new = [number for number, layer in enumerate(image.layers) if layer.diff_id not in taken]
    progress.begin("encrypt", sum(image.layers[number].size for number in new))
    volumes: dict[str, tuple[WrittenVolume, WrittenVolume]] = {}
    with closing(DirectoriesBelow()) as below:
        for number, layer in enumerate(image.layers):
            if layer.diff_id in volumes:
                # One that an image has twice, as it may have an empty one, is stored once.
                continue
            if layer.diff_id in taken:
                volumes[layer.diff_id] = taken[layer.diff_id].volumes
                if new and number < new[-1]:
                    below.read(taken[layer.diff_id].image())
            else:
                volumes[layer.diff_id] = _write_layer(image, number, sink, options, below, progress)
    return [volume for pair in volumes.values() for volume in pair]


def _write_flat(image: SourceImage, sink: TrackedSink, options: ImageOptions, progress: Progress) -> WrittenVolume:
    progress.begin("encrypt", 2 * image.size)
    writer = VolumeWriter(sink, replace(options.volume, name=FLAT_NAME))
    try:
        with closing(FlattenPlan()) as plan:
            for number in range(len(image.layers)):
                with _checked(image, number, options, progress) as stream:
                    plan.read(TarReader(stream, _ignore), number)
            with ErofsWriter(writer, uuid=IMAGE_UUID, synthesise_parents=True, replace=True) as tree:
                for number in range(len(image.layers)):
                    with _checked(image, number, options, progress) as stream:
                        plan.write(TarReader(stream, _ignore), number, tree)
                tree.finish()
        return writer.finish()
    finally:
        writer.abort()


def _ignore(_data: bytes) -> None:
    """What is no file's contents is not kept."""


@contextmanager
def _checked(image: SourceImage, number: int, options: ImageOptions, progress: Progress) -> Iterator[ByteStream]:
    """A layer's archive to be read to its end; errors name the layer. Raises: IntegrityError for another diff ID."""
    layer = image.layers[number]
    try:
        stream = ByteStream(layer.tar(progress.advance, maximum=options.max_layer_size, what="it"))
        yield stream
        if stream.digest() != layer.diff_id:
            raise IntegrityError(
                f"its content is {stream.digest()}, not what the image's config says",
                hint="the image is damaged, or was put together wrongly; get it again from its maker",
            )
    except EncfsError as error:
        what = f"layer {number + 1} of {len(image.layers)} ({layer.diff_id})"
        raise type(error)(f"{what}: {error.message}", hint=error.hint) from error
    except OSError as error:
        raise StorageError(f"layer {number + 1}: {error.strerror or error}") from error


def _write_layer(
    image: SourceImage,
    number: int,
    sink: TrackedSink,
    options: ImageOptions,
    below: DirectoriesBelow,
    progress: Progress,
) -> tuple[WrittenVolume, WrittenVolume]:
    diff_id = image.layers[number].diff_id
    with closing(RecipeWriter()) as recipe:
        with _checked(image, number, options, progress) as stream:
            volume = _sealed(sink, replace(options.volume, name=LAYER_PREFIX + diff_id), stream, recipe, below)
        auxiliary = VolumeWriter(sink, replace(options.volume, name=AUXILIARY_PREFIX + diff_id))
        try:
            recipe.write(auxiliary)
            return volume, auxiliary.finish()
        finally:
            auxiliary.abort()


def _sealed(
    sink: TrackedSink, options: VolumeOptions, stream: ByteStream, recipe: RecipeWriter, below: DirectoriesBelow
) -> WrittenVolume:
    writer = VolumeWriter(sink, options)
    try:
        with ErofsWriter(writer, uuid=IMAGE_UUID, synthesise_parents=True, replace=True) as image:
            write_layer(TarReader(stream, recipe.literal), writer, image, recipe, below)
            image.finish()
        return writer.finish()
    finally:
        writer.abort()
