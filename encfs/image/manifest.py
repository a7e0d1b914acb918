"""Manifests and indexes of container images (OCI image-spec v1.1, manifest.md, image-index.md; Docker's of schema 2).

Untrusted documents in, checked ones out: what is read is checked strictly, members that are not known are kept as they
are, so that a document can be written again with some of it replaced. Not here: the manifest of this project's own
artifacts (`encfs.format.descriptor`), configs (`config`), what the layers mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from encfs.encoding import parse_digest
from encfs.errors import FormatError, UnsupportedError, UsageError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor, RawManifest
from encfs.strictjson import MAX_INTEGER, loads_object, show_name

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX_TYPE = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
DOCKER_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"

MANIFEST_TYPES = frozenset({MANIFEST_TYPE, DOCKER_MANIFEST_TYPE})
INDEX_TYPES = frozenset({INDEX_TYPE, DOCKER_INDEX_TYPE})
CONFIG_TYPES = frozenset({CONFIG_TYPE, DOCKER_CONFIG_TYPE})

#: Layers of an image, and entries of an index, at most.
MAX_LAYERS = 512
MAX_ENTRIES = 512
_MAX_NAME = 255
# Marks entries of an index that describe another one instead of being an image (BuildKit's attestations).
_REFERENCE_TYPE = "vnd.docker.reference.type"


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on; `variant` may be empty."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def matches(self, wanted: Platform) -> bool:
        """Whether this is the wanted platform; a wanted one without a variant takes any."""
        return (self.os, self.architecture) == (wanted.os, wanted.architecture) and (
            not wanted.variant or wanted.variant == self.variant
        )


@dataclass(frozen=True, slots=True)
class ImageManifest:
    """The manifest of one image. `document` is all of it, as parsed."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    document: Mapping[str, object] = field(repr=False)

    def rewritten(self, layers: Sequence[Descriptor]) -> bytes:
        """An OCI manifest with other layers; everything else stays, the config's digest too.

        Docker's media types of manifest and config become OCI's: the config's bytes mean the same under both.
        Raises: FormatError where it would be larger than a manifest may be.
        """
        documents = self.document["layers"]
        if not isinstance(documents, list) or len(documents) != len(layers):
            raise ValueError("not as many layers as before")
        config = self.document["config"]
        if self.config.media_type == DOCKER_CONFIG_TYPE and isinstance(config, dict):
            config = config | {"mediaType": CONFIG_TYPE}
        changed = {
            "mediaType": MANIFEST_TYPE,
            "config": config,
            "layers": [
                document if old == new else _changed(document, old, new)
                for document, old, new in zip(documents, self.layers, layers, strict=True)
            ],
        }
        return _serialised(dict(self.document) | changed, "manifest")


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An entry of an index: a manifest, and the platform that it says it is for (None: it says nothing)."""

    descriptor: Descriptor
    platform: Platform | None

    @property
    def is_attestation(self) -> bool:
        """Whether it describes another entry (provenance, a bill of materials) instead of being an image."""
        return _REFERENCE_TYPE in self.descriptor.annotations


@dataclass(frozen=True, slots=True)
class ImageIndex:
    """An index of the manifests of several platforms. `document` is all of it, as parsed."""

    media_type: str
    entries: tuple[IndexEntry, ...]
    document: Mapping[str, object] = field(repr=False)

    def rewritten(self, replaced: Mapping[str, Descriptor]) -> bytes:
        """An OCI index of those entries whose digests are in `replaced`, under their new digests and sizes.

        Raises: FormatError.
        """
        documents = self.document["manifests"]
        if not isinstance(documents, list):
            raise TypeError("not a parsed index")
        manifests = []
        for document, entry in zip(documents, self.entries, strict=True):
            old = entry.descriptor
            if old.digest in replaced:
                manifests.append(_changed(document, old, replace(replaced[old.digest], annotations=old.annotations)))
        return _serialised(dict(self.document) | {"mediaType": INDEX_TYPE, "manifests": manifests}, "index")


def parse_image(raw: RawManifest) -> ImageManifest | ImageIndex:
    """The image that a store gave, by its media type. Raises: FormatError, UnsupportedError."""
    if raw.media_type in INDEX_TYPES:
        return parse_image_index(raw.content, raw.media_type)
    return parse_image_manifest(raw.content, raw.media_type)


def parse_image_manifest(content: bytes, media_type: str) -> ImageManifest:
    """`media_type` is the one the store or the descriptor says.

    Raises: UnsupportedError for another kind of document; FormatError where it is malformed, says to be something else,
    or could be read as an index as well (CVE-2021-41190).
    """
    if media_type not in MANIFEST_TYPES:
        raise UnsupportedError(f"{show_name(media_type)} is no manifest of a container image")
    document = _document(content, media_type, "the image's manifest", forbidden=("manifests", "fsLayers", "history"))
    layers = document.get("layers")
    if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
        raise FormatError(f"the image's manifest has no list of at most {MAX_LAYERS} layers")
    return ImageManifest(
        media_type,
        parse_descriptor(document.get("config"), "the image's config descriptor"),
        tuple(parse_descriptor(layer, f"the descriptor of layer {index}") for index, layer in enumerate(layers)),
        document,
    )


def parse_image_index(content: bytes, media_type: str) -> ImageIndex:
    """Raises: as `parse_image_manifest`."""
    if media_type not in INDEX_TYPES:
        raise UnsupportedError(f"{show_name(media_type)} is no index of container images")
    document = _document(content, media_type, "the image index", forbidden=("layers", "config", "fsLayers"))
    entries = document.get("manifests")
    if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
        raise FormatError(f"the image index has no list of at most {MAX_ENTRIES} manifests")
    return ImageIndex(media_type, tuple(_entry(value, index) for index, value in enumerate(entries)), document)


def parse_descriptor(value: object, what: str) -> Descriptor:
    """An untrusted descriptor; `what` names it in the message. Raises: FormatError."""
    if not isinstance(value, dict):
        raise FormatError(f"{what} is not a JSON object")
    media_type, size, artifact_type = value.get("mediaType"), value.get("size"), value.get("artifactType")
    parse_digest(value.get("digest"), f"the digest in {what}")
    if not isinstance(media_type, str) or not 0 < len(media_type) <= _MAX_NAME:
        raise FormatError(f"{what} has no media type of at most {_MAX_NAME} characters")
    if type(size) is not int or not 0 <= size <= MAX_INTEGER:
        raise FormatError(f"{what} has no size")
    if not isinstance(artifact_type, str | None):
        raise FormatError(f"{what} has an artifactType that is no text")
    annotations = value.get("annotations")
    if annotations is None:
        annotations = {}
    if not isinstance(annotations, dict) or not all(isinstance(text, str) for text in annotations.values()):
        raise FormatError(f"{what} has annotations that are not texts")
    return Descriptor(media_type, str(value["digest"]), size, artifact_type, annotations)


def parse_platform(text: str) -> Platform:
    """A platform as on a command line, `OS/ARCHITECTURE[/VARIANT]`. Raises: UsageError."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(
        part and part.isascii() and part.isprintable() and " " not in part for part in parts
    ):
        raise UsageError(f"{show_name(text)} is not of the form OS/ARCHITECTURE[/VARIANT], such as linux/amd64")
    return Platform(*parts)


def chosen_entries(index: ImageIndex, wanted: Iterable[Platform]) -> list[IndexEntry]:
    """The images of an index, all of them or those of the wanted platforms. Raises: UsageError where one is missing."""
    images = [entry for entry in index.entries if not entry.is_attestation]
    wanted = list(wanted)
    for platform in wanted:
        if not any(entry.platform is not None and entry.platform.matches(platform) for entry in images):
            offered = ", ".join(sorted({str(entry.platform) for entry in images if entry.platform is not None}))
            raise UsageError(f"the image is not for {platform}", hint=f"it is for {offered or 'unnamed platforms'}")
    if not wanted:
        return images
    return [
        entry
        for entry in images
        if entry.platform is not None and any(entry.platform.matches(platform) for platform in wanted)
    ]


def _document(content: bytes, media_type: str, what: str, *, forbidden: Iterable[str]) -> dict[str, object]:
    document = loads_object(content, limit=MAX_MANIFEST_SIZE, what=what)
    if document.get("schemaVersion") != 2:
        raise UnsupportedError(f"{what} is not of schema version 2")
    stated = document.get("mediaType")
    # Absent is allowed in OCI's, and then the store's word counts.
    if stated is not None and stated != media_type:
        raise FormatError(f"{what} says to be {show_name(stated)} and was given as {media_type}")
    for name in forbidden:
        if name in document:
            raise FormatError(f"{what} has the member {name}, which belongs to another kind of document")
    return document


def _entry(value: object, index: int) -> IndexEntry:
    what = f"entry {index} of the image index"
    descriptor = parse_descriptor(value, what)
    platform = value.get("platform") if isinstance(value, dict) else None
    if platform is None:
        return IndexEntry(descriptor, None)
    if not isinstance(platform, dict):
        raise FormatError(f"{what} has a platform that is no JSON object")
    system, architecture, variant = (platform.get(name, "") for name in ("os", "architecture", "variant"))
    for text in (system, architecture, variant):
        if not isinstance(text, str) or len(text) > _MAX_NAME or not text.isprintable():
            raise FormatError(f"{what} has a platform that is not made of texts")
    return IndexEntry(descriptor, Platform(system, architecture, variant))


def _changed(document: object, old: Descriptor, new: Descriptor) -> dict[str, object]:
    """A descriptor's document with what is ours replaced; other members stay, but for those that tell other bytes."""
    if not isinstance(document, dict):
        raise TypeError("not a parsed descriptor")
    dropped = {"annotations"} if old.digest == new.digest else {"annotations", "urls", "data"}
    changed = {name: value for name, value in document.items() if name not in dropped}
    changed |= {"mediaType": new.media_type, "digest": new.digest, "size": new.size}
    if new.annotations:
        changed["annotations"] = dict(new.annotations)
    return changed


def _serialised(document: Mapping[str, object], what: str) -> bytes:
    content = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    if len(content) > MAX_MANIFEST_SIZE:
        raise FormatError(
            f"the image's {what} would be {len(content)} bytes, more than the {MAX_MANIFEST_SIZE} allowed",
            hint="use fewer recipients or shorter annotations",
        )
    return content
