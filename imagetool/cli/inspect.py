"""`imagetool inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from encfs.commandparts import (
    IndexPlatformOption,
    ReferenceArgument,
    RegistryOptions,
    opened_source,
    wanted_platform,
)
from encfs.terminal import Terminal
from encfs.units import format_size
from imagetool.cli.indexes import Told, tell

if TYPE_CHECKING:
    from encfs.artifact import LoadedArtifact
    from encfs.image.manifest import Platform
    from encfs.oci.blobs import RawManifest


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    platform: IndexPlatformOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Show what is public of an artifact. Of an image index all are shown. Needs no key; nothing of it is proven."""
    from encfs.artifact import load_artifact
    from encfs.image.artifact import for_each_artifact

    with opened_source(reference, registry) as source:

        def told(manifest: RawManifest, listed: Platform | None) -> Told:
            artifact = load_artifact(source, manifest)
            return Told(listed, _document(artifact), list(_lines(reference, artifact)))

        document = source.document()
        tell(
            terminal,
            reference,
            document,
            platform,
            for_each_artifact(source, document, told, wanted_platform(platform)),
        )


def _document(artifact: LoadedArtifact) -> dict[str, object]:
    content = artifact.content
    return {
        "content_digest": content.digest,
        "manifest_digest": artifact.manifest.digest,
        "id": content.id,
        "version": content.version,
        "created": content.created,
        "suite": content.suite.to_json(),
        "volumes": [volume.to_json() for volume in content.volumes],
        "recipients": recipients_document(artifact),
        "signatures": [{"digest": one.digest, "size": one.size} for one in artifact.index.signatures],
    }


def recipients_document(artifact: LoadedArtifact) -> list[dict[str, object]]:
    return [
        {"index": one.index, "type": one.kind, "algorithm": one.alg, "kid": one.kid, "provider": one.service or None}
        for one in artifact.keyring.recipients
    ]


def recipient_lines(artifact: LoadedArtifact) -> Iterator[str]:
    for one in artifact.keyring.recipients:
        yield f"{one.index:>3}  {one.kind:<15} {one.kid or one.service or '-'}"


def _lines(reference: str, artifact: LoadedArtifact) -> Iterator[str]:
    content = artifact.content
    yield reference
    yield f"id              {content.id}, version {content.version}, made {content.created}"
    yield f"content digest  {content.digest}"
    yield f"manifest        {artifact.manifest.digest}"
    yield f"algorithms      {', '.join(content.suite.to_json().values())}"
    for number, volume in enumerate(content.volumes):
        yield (
            f"volume {number}        {volume.kind}, {format_size(volume.size)}, {volume.frames} frames of "
            f"{format_size(volume.frame_size)}, stored as {format_size(volume.stored_size)} in "
            f"{len(volume.segments)} segments"
        )
        yield f"root            {volume.root.hex()}"
    yield f"signatures      {len(artifact.signatures)} (not checked here: imagetool verify)"
    yield "recipients"
    yield from recipient_lines(artifact)
