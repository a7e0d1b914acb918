"""`imagetool recipients list|add|remove`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandline import add_command
from encfs.console.commandparts import (
    IndexPlatformOption,
    KeyOptions,
    ReferenceArgument,
    RegistryOptions,
    TrustOptions,
    wanted_platform,
)
from encfs.console.terminal import Terminal
from encfs.errors import MissingKeyError
from imagetool.cli.editing import edited, report
from imagetool.cli.encrypt import PassphraseFileOption, RecipientsOption
from imagetool.cli.indexes import tell_of_public
from imagetool.cli.inspect import recipient_lines, recipients_document
from imagetool.cli.recipientkeys import ForWhat, recipient_keys

if TYPE_CHECKING:
    from encfs.artifact import LoadedArtifact
    from encfs.image.manifest import Platform
    from encfs.keys.jwk import PublicKey
    from encfs.oci.blobs import BlobSource, RawManifest

app = typer.Typer(name="recipients", help="Show and change who can open an artifact.", rich_markup_mode=None)


def list_recipients(
    terminal: Terminal,
    reference: ReferenceArgument,
    platform: IndexPlatformOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """List the recipients of an artifact. Of an image index all are listed. Needs no key; nothing of it is proven."""

    def described(artifact: LoadedArtifact) -> tuple[dict[str, object], list[str]]:
        members = {"content_digest": artifact.content_digest, "recipients": recipients_document(artifact)}
        return dict(members), list(recipient_lines(artifact))

    tell_of_public(terminal, reference, platform, registry, described)


def add(
    terminal: Terminal,
    reference: ReferenceArgument,
    recipients: RecipientsOption = None,
    passphrase_file: PassphraseFileOption = None,
    platform: IndexPlatformOption = None,
    *,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Let more keys open an artifact. Needs a key that opens it."""
    from imagetool.pipeline.edit import add_recipients

    policy, wanted = trust.policy(), wanted_platform(platform)
    if not recipients and passphrase_file is None:
        raise MissingKeyError("no recipient was given", hint="pass -r KEY or --passphrase-file FILE")
    with keys.providers() as providers, edited(reference, registry) as artifact:
        there = _artifacts(artifact.source, wanted)
        with recipient_keys(terminal, recipients or (), passphrase_file, there) as added:
            manifest = add_recipients(
                artifact.source, artifact.sink, providers, added, trust=policy, tag=artifact.tag, wanted=wanted
            )
    report(terminal, artifact, manifest, f"{len(added)} recipients added")


def _artifacts(source: BlobSource, wanted: Platform | None) -> list[ForWhat]:
    """What the artifacts say that they are; `add_recipients` checks them."""
    from encfs.artifact import load_artifact
    from encfs.image.artifact import for_each_artifact

    def named(manifest: RawManifest, _listed: Platform | None) -> ForWhat:
        content = load_artifact(source, manifest).content
        return ForWhat(content.id, content.version)

    return list(for_each_artifact(source, source.document(), named, wanted))


def remove(
    terminal: Terminal,
    reference: ReferenceArgument,
    recipient: Annotated[
        str,
        typer.Argument(
            metavar="RECIPIENT", help="Its number or key id as 'list' shows them, or its key file.", show_default=False
        ),
    ],
    platform: IndexPlatformOption = None,
    *,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Drop a recipient's entry. It may have kept what it could read: revoking needs a new version under fresh keys."""
    from imagetool.pipeline.edit import remove_recipient

    policy = trust.policy()
    with edited(reference, registry) as artifact:
        manifest = remove_recipient(
            artifact.source,
            artifact.sink,
            _selector(recipient),
            trust=policy,
            tag=artifact.tag,
            wanted=wanted_platform(platform),
        )
    terminal.warn(
        "a removed recipient may have kept the key; to revoke access encrypt a new version and raise --min-version"
    )
    report(terminal, artifact, manifest, "recipient removed")


def _selector(text: str) -> int | str | PublicKey:
    from encfs.keys.files import load_recipient_key
    from encfs.keys.jwk import PublicKey

    if text.isascii() and text.isdecimal() and len(text) < 4:
        return int(text)
    if Path(text).is_file():
        key = load_recipient_key(text)
        if isinstance(key, PublicKey):
            return key
        return key.kid or text
    return text


add_command(app, "list", list_recipients)
add_command(app, "add", add)
add_command(app, "remove", remove)
