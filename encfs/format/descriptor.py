"""The artifact's two public JSON documents: the content descriptor, and the OCI manifest that carries everything.

Parsing is strict (docs/format.md, "Content descriptor"): unknown members, odd encodings and numbers that contradict one
another are refused, so that one meaning is left for the bytes that are signed. A descriptor is built once, in canonical
form (RFC 8785), and never re-serialised: its exact bytes are kept beside the parsed value.

Not here: trust (`encfs.trust`), the keyring (`encfs.keys.keyring`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import rfc8785

from encfs.encoding import hex_decode, parse_digest, sha256_digest
from encfs.errors import FormatError, UnsupportedError
from encfs.format.frames import FrameGeometry, check_frame_size
from encfs.format.suite import HASH_SIZE, VOLUME_ID_SIZE, Suite, suite_from_json
from encfs.format.tree import MAX_SEGMENTS, RootInput, TreeGeometry
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.strictjson import MAX_INTEGER, loads_object

FORMAT = "encfs/1"
ARTIFACT_TYPE = "application/vnd.encfs.artifact.v1"
CONTENT_TYPE = "application/vnd.encfs.content.v1+json"
KEYRING_TYPE = "application/vnd.encfs.keyring.v1+json"
SIGNATURE_TYPE = "application/vnd.encfs.signature.v1+json"
TREE_TYPE = "application/vnd.encfs.tree.v1"
SEGMENT_TYPE = "application/vnd.encfs.segment.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"

MAX_VOLUMES = 512
MAX_SIGNATURES = 16
MAX_KEYRING_SIZE = 1 << 20
MAX_SIGNATURE_SIZE = MAX_MANIFEST_SIZE * 2
#: Layers of a manifest at most; 4 MiB would hold fewer anyway.
_MAX_LAYERS = 1 << 16
_KINDS = ("erofs",)
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@:+-]{0,254}", re.ASCII)
_CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)


@dataclass(frozen=True, slots=True)
class SegmentDescriptor:
    """One segment: its blob, and how many frames lie in it."""

    digest: str
    size: int
    frames: int


@dataclass(frozen=True, slots=True)
class VolumeDescriptor:
    """One volume of an artifact. Sizes in bytes; `id` and `root` raw bytes."""

    id: bytes
    kind: str
    size: int
    frame_size: int
    frames: int
    root: bytes
    tree_digest: str
    tree_size: int
    segments: tuple[SegmentDescriptor, ...]

    @property
    def geometry(self) -> FrameGeometry:
        return FrameGeometry(self.size, self.frame_size)

    @property
    def stored_size(self) -> int:
        """Bytes of the tree and all segments."""
        return self.tree_size + sum(segment.size for segment in self.segments)

    def root_input(self, suite: Suite) -> RootInput:
        """What the root commits to besides the top node."""
        sizes = [segment.size for segment in self.segments]
        return RootInput(suite, self.id, self.frame_size, self.size, self.frames, sizes)

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.id.hex(),
            "kind": self.kind,
            "size": self.size,
            "frame_size": self.frame_size,
            "frames": self.frames,
            "root": self.root.hex(),
            "tree": {"digest": self.tree_digest, "size": self.tree_size},
            "segments": [{"digest": s.digest, "size": s.size, "frames": s.frames} for s in self.segments],
        }


@dataclass(frozen=True, slots=True)
class ContentDescriptor:
    """The parsed content descriptor together with its exact bytes (`content`)."""

    id: str
    version: int
    created: str
    suite: Suite
    payload_commitment: bytes
    volumes: tuple[VolumeDescriptor, ...]
    content: bytes

    @property
    def digest(self) -> str:
        """The content digest, `sha256:<hex>`: the artifact's identity."""
        return sha256_digest(self.content)


def build_content(
    *,
    artifact_id: str,
    version: int,
    created: str,
    suite: Suite,
    payload_commitment: bytes,
    volumes: Sequence[VolumeDescriptor],
) -> ContentDescriptor:
    """Serialise a new descriptor (RFC 8785), and read it back by the reader's own rules. Raises FormatError."""
    document: dict[str, object] = {
        "format": FORMAT,
        "id": artifact_id,
        "version": version,
        "created": created,
        "suite": suite.to_json(),
        "payload_commitment": f"sha256:{payload_commitment.hex()}",
        "volumes": [volume.to_json() for volume in volumes],
    }
    return parse_content(rfc8785.dumps(document))  # type: ignore[arg-type]


def parse_content(content: bytes) -> ContentDescriptor:
    """Raises FormatError where anything is malformed or contradictory, UnsupportedError for another format version."""
    document = loads_object(content, limit=MAX_MANIFEST_SIZE, what="the content descriptor")
    if document.get("format") != FORMAT:
        raise UnsupportedError(f"the content descriptor is not of format {FORMAT}", hint="use a newer version of encfs")
    fields = _Fields(document, "the content descriptor")
    fields.take("format")
    descriptor = ContentDescriptor(
        id=fields.text("id", _ID),
        version=fields.integer("version"),
        created=fields.text("created", _CREATED),
        suite=suite_from_json(fields.take("suite")),
        payload_commitment=parse_digest(fields.take("payload_commitment"), "payload_commitment"),
        volumes=tuple(_volume(item) for item in fields.array("volumes", 1, MAX_VOLUMES)),
        content=content,
    )
    fields.finish()
    if len({volume.id for volume in descriptor.volumes}) != len(descriptor.volumes):
        raise FormatError("the content descriptor repeats a volume id")
    return descriptor


def is_valid_id(text: str) -> bool:
    """Whether `text` may be an artifact's `id`."""
    return _ID.fullmatch(text) is not None


def _volume(value: object) -> VolumeDescriptor:
    fields = _Fields(value, "a volume of the content descriptor")
    tree = _Fields(fields.take("tree"), "a volume's tree")
    volume = VolumeDescriptor(
        id=fields.binary("id", VOLUME_ID_SIZE),
        kind=fields.text("kind", re.compile("|".join(_KINDS))),
        size=fields.integer("size"),
        frame_size=fields.integer("frame_size"),
        frames=fields.integer("frames"),
        root=fields.binary("root", HASH_SIZE),
        tree_digest=tree.digest("digest"),
        tree_size=tree.integer("size"),
        segments=tuple(_segment(item) for item in fields.array("segments", 0, MAX_SEGMENTS)),
    )
    tree.finish()
    fields.finish()
    check_frame_size(volume.frame_size)
    if volume.frames != volume.geometry.count:
        raise FormatError(
            f"a volume of {volume.size} bytes in {volume.frame_size}-byte frames has {volume.geometry.count}"
        )
    if volume.tree_size != TreeGeometry.of(volume.frames).size:
        raise FormatError("a volume's tree is not of the size that its frames need")
    if sum(segment.frames for segment in volume.segments) != volume.frames:
        raise FormatError("the segments of a volume do not add up to its frames")
    return volume


def _segment(value: object) -> SegmentDescriptor:
    fields = _Fields(value, "a segment of the content descriptor")
    segment = SegmentDescriptor(fields.digest("digest"), fields.integer("size"), fields.integer("frames"))
    fields.finish()
    if not 0 < segment.frames <= segment.size:
        raise FormatError("a segment of the content descriptor holds no frames")
    return segment


@dataclass(frozen=True, slots=True)
class ArtifactManifest:
    """An artifact's OCI manifest, untrusted: where the descriptor, the keyring and the signatures are."""

    config: Descriptor
    keyring: Descriptor
    signatures: tuple[Descriptor, ...]
    blobs: tuple[Descriptor, ...]
    annotations: Mapping[str, str]


def build_manifest(
    content: ContentDescriptor,
    keyring: Descriptor,
    signatures: Sequence[Descriptor],
    annotations: Mapping[str, str] | None = None,
) -> bytes:
    """The manifest's bytes (RFC 8785): config, then keyring, signatures, and per volume its tree and segments."""
    layers = [_descriptor_json(keyring.media_type, keyring.digest, keyring.size)]
    layers += [_descriptor_json(item.media_type, item.digest, item.size) for item in signatures]
    for volume in content.volumes:
        layers.append(_descriptor_json(TREE_TYPE, volume.tree_digest, volume.tree_size))
        layers += [_descriptor_json(SEGMENT_TYPE, item.digest, item.size) for item in volume.segments]
    document: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": _descriptor_json(CONTENT_TYPE, content.digest, len(content.content)),
        "layers": layers,
    }
    if annotations:
        document["annotations"] = dict(annotations)
    manifest = rfc8785.dumps(document)  # type: ignore[arg-type]
    if len(manifest) > MAX_MANIFEST_SIZE or len(content.content) > MAX_MANIFEST_SIZE:
        raise UnsupportedError(
            f"{len(layers)} blobs do not fit into one OCI manifest of at most {MAX_MANIFEST_SIZE} bytes",
            hint="choose a larger --segment-size",
        )
    return manifest


def parse_manifest(content: bytes) -> ArtifactManifest:
    """Raises FormatError where it is malformed, UnsupportedError where it is a manifest of something else."""
    document = loads_object(content, limit=MAX_MANIFEST_SIZE, what="the manifest")
    config = document.get("config")
    layers = document.get("layers")
    if document.get("schemaVersion") != 2 or not isinstance(config, dict) or not isinstance(layers, list):
        raise UnsupportedError("the reference is no OCI manifest of an encfs artifact")
    # artifactType may have been dropped by an older tool on a copy; the config's media type is the same statement.
    if document.get("artifactType", ARTIFACT_TYPE) != ARTIFACT_TYPE or config.get("mediaType") != CONTENT_TYPE:
        raise UnsupportedError(
            "the reference is an OCI image or another artifact, not an encfs artifact",
            hint="encrypt it with imagetool first",
        )
    if len(layers) > _MAX_LAYERS:
        raise FormatError(f"the manifest lists {len(layers)} layers, more than the {_MAX_LAYERS} allowed")
    blobs = tuple(parse_oci_descriptor(item) for item in layers)
    keyrings = [item for item in blobs if item.media_type == KEYRING_TYPE]
    signatures = tuple(item for item in blobs if item.media_type == SIGNATURE_TYPE)
    if len(keyrings) != 1:
        raise FormatError(f"the manifest lists {len(keyrings)} keyrings, an artifact has exactly one")
    if len(signatures) > MAX_SIGNATURES:
        raise FormatError(f"the manifest lists {len(signatures)} signatures, at most {MAX_SIGNATURES} are allowed")
    annotations = document.get("annotations", {})
    if not isinstance(annotations, dict) or not all(isinstance(item, str) for item in annotations.values()):
        raise FormatError("the manifest's annotations are not an object of strings")
    return ArtifactManifest(parse_oci_descriptor(config), keyrings[0], signatures, blobs, annotations)


def parse_oci_descriptor(value: object) -> Descriptor:
    """A descriptor inside an untrusted manifest; members beyond the known ones are allowed and dropped."""
    if not isinstance(value, dict):
        raise FormatError("a descriptor in the manifest is not an object")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or not 0 < len(media_type) <= 255:
        raise FormatError("a descriptor in the manifest has no media type")
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise FormatError("a descriptor in the manifest has no size")
    parse_digest(digest, "a descriptor's digest")
    return Descriptor(media_type, str(digest), size)


def _descriptor_json(media_type: str, digest: str, size: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest, "size": size}


class _Fields:
    """The members of one JSON object, taken one by one; what is left over at the end is refused."""

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(f"{what} is not an object")
        self._members: dict[str, object] = dict(value)
        self._what = what

    def take(self, name: str) -> object:
        if name not in self._members:
            raise FormatError(f"{self._what} has no member {name!r}")
        return self._members.pop(name)

    def integer(self, name: str) -> int:
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
            raise FormatError(f"{name!r} of {self._what} is not an integer from 0 to 2^53-1")
        return value

    def text(self, name: str, pattern: re.Pattern[str]) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise FormatError(f"{name!r} of {self._what} is not of the form {pattern.pattern}")
        return value

    def binary(self, name: str, size: int) -> bytes:
        value = hex_decode(self.take(name), f"{name!r} of {self._what}")
        if len(value) != size:
            raise FormatError(f"{name!r} of {self._what} is not of {size} bytes")
        return value

    def digest(self, name: str) -> str:
        value = self.take(name)
        parse_digest(value, f"{name!r} of {self._what}")
        return str(value)

    def array(self, name: str, least: int, most: int) -> list[object]:
        value = self.take(name)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise FormatError(f"{name!r} of {self._what} is not an array of {least} to {most} items")
        return value

    def finish(self) -> None:
        if self._members:
            raise FormatError(f"{self._what} has a member that is not known: {sorted(self._members)[0][:40]!r}")
