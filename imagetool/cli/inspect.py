"""`imagetool inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from encfs.console.commandparts import IndexPlatformOption, ReferenceArgument, RegistryOptions
from encfs.console.terminal import Terminal
from encfs.units import format_size
from imagetool.cli.indexes import tell_of_public

if TYPE_CHECKING:
    from encfs.artifact import LoadedArtifact


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    platform: IndexPlatformOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Show what is public of an artifact. Of an image index all are shown. Needs no key; nothing of it is proven."""
    tell_of_public(terminal, reference, platform, registry, lambda one: (_document(one), list(_lines(reference, one))))


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
