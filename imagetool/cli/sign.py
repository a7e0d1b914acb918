"""`imagetool sign`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandparts import (
    IndexPlatformOption,
    ReferenceArgument,
    RegistryOptions,
    TrustOptions,
    wanted_platform,
)
from encfs.console.terminal import Terminal
from imagetool.cli.editing import edited, report


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    key: Annotated[
        str, typer.Option("--key", metavar="KEY", help="The private signing key (JWK or PEM file).", show_default=False)
    ],
    platform: IndexPlatformOption = None,
    *,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Add a signature. The trust options say what makes this the artifact that you mean to vouch for."""
    from encfs.hardening import protect_keys
    from encfs.keys.files import load_signing_key
    from imagetool.pipeline.edit import sign_artifact

    policy = trust.policy()
    protect_keys()
    signer = load_signing_key(key)
    with edited(reference, registry) as artifact:
        manifest = sign_artifact(
            artifact.source, artifact.sink, signer, trust=policy, tag=artifact.tag, wanted=wanted_platform(platform)
        )
    report(terminal, artifact, manifest, f"signed by {signer.kid}")
