"""Choose the manifest for a platform in an image index (OCI image-spec v1.1, image-index.md).

The index is untrusted and decides nothing: see `artifact`.
"""

from __future__ import annotations

from collections.abc import Mapping

from encfs.encoding import parse_digest
from encfs.errors import FormatError, NotFoundError
from encfs.image.artifact import Platform
from encfs.oci.blobs import MAX_MANIFEST_SIZE, BlobSource, RawManifest
from encfs.strictjson import loads_object

_INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_MAX_ENTRIES = 1024


def choose_manifest(source: BlobSource, platform: Platform) -> RawManifest:
    """The manifest that the source's reference names; where that is an index, the first of it for `platform`.

    Raises: NotFoundError where the index has none; FormatError; UnsupportedError for an index within an index; what the
    source raises.
    """
    document = source.document()
    if document.media_type not in _INDEX_TYPES:
        return document
    found = []
    for entry in _entries(document.content):
        offered = _platform(entry)
        if offered is not None and offered.matches(platform):
            parse_digest(entry.get("digest"), "a digest of the image index")
            return source.manifest(str(entry["digest"]))
        if offered is not None:
            found.append(str(offered))
    raise NotFoundError(
        f"the image index has no manifest for {platform}",
        hint=f"it has {', '.join(sorted(found))}; choose one with --platform" if found else None,
    )


def _entries(content: bytes) -> list[Mapping[str, object]]:
    entries = loads_object(content, limit=MAX_MANIFEST_SIZE, what="image index").get("manifests")
    if not isinstance(entries, list) or len(entries) > _MAX_ENTRIES:
        raise FormatError(f"the image index has no list of at most {_MAX_ENTRIES} manifests")
    if not all(isinstance(one, dict) for one in entries):
        raise FormatError("an entry of the image index is not an object")
    return entries


def _platform(entry: Mapping[str, object]) -> Platform | None:
    value = entry.get("platform")
    if not isinstance(value, dict):
        return None
    system, architecture, variant = value.get("os"), value.get("architecture"), value.get("variant", "")
    if not isinstance(system, str) or not isinstance(architecture, str) or not isinstance(variant, str):
        return None
    return Platform(system, architecture, variant)
