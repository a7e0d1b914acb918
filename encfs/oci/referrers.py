"""Lists of referrers: what a registry answers, or what is kept under a tag where it has no such list.

(distribution-spec v1.1, "Listing Referrers", "Referrers Tag Schema".) Not here: asking the registry (`registry`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rfc8785 import dumps as canonical_json

from encfs.encoding import parse_digest
from encfs.errors import FormatError
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from encfs.strictjson import loads_object

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MAX_REFERRERS = 1024


def referrers_tag(digest: str) -> str:
    """The tag that the list of a digest's referrers is kept under."""
    return digest.replace(":", "-")


def subject_of(manifest: dict[str, Any]) -> str | None:
    """The digest of what a manifest refers to, if it does. Raises: FormatError."""
    subject = manifest.get("subject")
    if not isinstance(subject, dict):
        return None
    digest = subject.get("digest")
    parse_digest(digest, "the digest of the manifest's subject")
    return str(digest)


def list_with(listed: Iterable[Descriptor], descriptor: Descriptor, manifest: dict[str, Any]) -> bytes:
    """The list with another manifest, whose document is `manifest`."""
    added = replace(descriptor, artifact_type=descriptor.artifact_type or _artifact_type(manifest))
    manifests = [_descriptor_document(item) for item in (*listed, added)]
    return canonical_json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests})


def parse_index(content: bytes) -> list[Descriptor]:
    """The descriptors of an untrusted image index, at most 1,024. Raises: FormatError."""
    index = loads_object(content, limit=MAX_MANIFEST_SIZE, what="image index")
    # Registries that are written in Go have null for an empty list.
    entries = [] if "manifests" in index and index["manifests"] is None else index.get("manifests")
    if not isinstance(entries, list):
        raise FormatError("the image index has no list of manifests")
    return [_parse_descriptor(item) for item in entries[:MAX_REFERRERS]]


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
