"""`imagetool verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from encfs.console.commandparts import (
    IndexPlatformOption,
    KeyOptions,
    ReferenceArgument,
    RegistryOptions,
    TrustOptions,
    opened_source,
    origin_document,
    wanted_platform,
)
from encfs.console.terminal import Terminal
from encfs.units import format_size
from imagetool.cli.indexes import Told, tell

if TYPE_CHECKING:
    from encfs.image.manifest import Platform
    from encfs.oci.blobs import RawManifest
    from imagetool.pipeline.check import VerifyResult


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    platform: IndexPlatformOption = None,
    *,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Check all of an artifact's ciphertext. Of an image index all artifacts are checked.

    With trust options its origin is checked, too, and with a key that every frame opens.
    """
    from encfs.image.artifact import check_pin_names_one, for_each_artifact
    from imagetool.pipeline.check import verify

    policy = trust.policy() if trust.given else None
    wanted = wanted_platform(platform)
    warnings: dict[str, None] = {}
    with keys.providers() as providers, opened_source(reference, registry) as source, terminal.progress() as progress:

        def told(manifest: RawManifest, listed: Platform | None) -> Told:
            result = verify(source, manifest, listed=listed, keys=providers, trust=policy, progress=progress)
            if result.origin is not None:
                warnings.update(dict.fromkeys(result.origin.warnings))
            return Told(listed, _members(result), _lines(reference, result))

        document = source.document()
        check_pin_names_one(document, trust.pin, wanted)
        results = list(for_each_artifact(source, document, told, wanted))
    for warning in warnings:
        terminal.warn(warning)
    tell(terminal, reference, document, platform, results)


def _members(result: VerifyResult) -> dict[str, object]:
    content = result.artifact.content
    return {
        "content_digest": content.digest,
        "manifest_digest": result.artifact.manifest.digest,
        "id": content.id,
        "version": content.version,
        "frames": result.frames,
        "stored_size": result.stored_size,
        "decrypted": result.decrypted,
        "origin": None if result.origin is None else origin_document(result.origin),
    }


def _lines(reference: str, result: VerifyResult) -> list[str]:
    origin = "not checked (no trust option was given)" if result.origin is None else str(result.origin)
    return [
        f"{reference}: {result.frames} frames, {format_size(result.stored_size)}: all as the root commits to",
        f"content digest  {result.artifact.content.digest}",
        f"decryption      {'every frame opens' if result.decrypted else 'not checked (no key was given)'}",
        f"origin          {origin}",
    ]
