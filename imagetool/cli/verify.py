"""`imagetool verify`."""

from __future__ import annotations

from encfs.commandparts import (
    KeyOptions,
    ReferenceArgument,
    RegistryOptions,
    TrustOptions,
    opened_source,
    origin_document,
    warn_of_origin,
)
from encfs.terminal import Terminal
from encfs.units import format_size


def command(
    terminal: Terminal, reference: ReferenceArgument, keys: KeyOptions, trust: TrustOptions, registry: RegistryOptions
) -> None:
    """Check all of an artifact's ciphertext.

    With trust options its origin is checked, too, and with a key that every frame opens.
    """
    from imagetool.pipeline.check import verify

    policy = trust.policy() if trust.given else None
    with keys.providers() as providers, opened_source(reference, registry) as source, terminal.progress() as progress:
        result = verify(source, keys=providers, trust=policy, progress=progress)
    if result.origin is not None:
        warn_of_origin(terminal, result.origin)
    content = result.artifact.content
    origin = "not checked (no trust option was given)" if result.origin is None else str(result.origin)
    terminal.result(
        {
            "reference": reference,
            "content_digest": content.digest,
            "manifest_digest": result.artifact.manifest.digest,
            "id": content.id,
            "version": content.version,
            "frames": result.frames,
            "stored_size": result.stored_size,
            "decrypted": result.decrypted,
            "origin": None if result.origin is None else origin_document(result.origin),
        },
        [
            f"{reference}: {result.frames} frames, {format_size(result.stored_size)}: all as the root commits to",
            f"content digest  {content.digest}",
            f"decryption      {'every frame opens' if result.decrypted else 'not checked (no key was given)'}",
            f"origin          {origin}",
        ],
    )
