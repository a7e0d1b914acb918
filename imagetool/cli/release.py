"""`imagetool release`."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandparts import (
    IndexPlatformOption,
    RegistryOptions,
    TrustOptions,
    opened_source,
    wanted_platform,
)
from encfs.console.terminal import Terminal
from encfs.errors import NotFoundError, UsageError
from encfs.oci.reference import parse_reference
from imagetool.cli.broker.parts import opened, resource_path

if TYPE_CHECKING:
    from encfs.format.descriptor import ContentDescriptor
    from encfs.image.manifest import Platform
    from encfs.oci.blobs import RawManifest
    from encfs.trust import TrustPolicy
    from imagetool.broker.opening import OpenedBroker
    from imagetool.broker.publishing import Publication, Release

_SHOWN = 20


def command(
    terminal: Terminal,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="An artifact (oci:…, oci-archive:…, docker://…), or a directory or file to encrypt to DEST.",
            show_default=False,
        ),
    ],
    destination: Annotated[
        str | None,
        typer.Argument(metavar="DEST", help="Where to encrypt a directory or file to.", show_default=False),
    ] = None,
    broker: Annotated[
        str, typer.Option("--broker", metavar="DIR", help="The broker's directory.", show_default=False)
    ] = "",
    resource: Annotated[
        str, typer.Option("--resource", metavar="PATH", help="The key of this line of artifacts.", show_default=False)
    ] = "",
    signer: Annotated[
        str | None,
        typer.Option("--sign", metavar="KEY", help="With DEST: sign with this private key.", show_default=False),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            "--artifact-version",
            metavar="N",
            help="With DEST: the version; one above the floor if left out.",
            show_default=False,
        ),
    ] = None,
    platform: IndexPlatformOption = None,
    *,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Publish a version. The floor of its key in the broker is raised; says which consumers are refused from now on."""
    if not broker or not resource:
        raise UsageError("--broker DIR and --resource PATH are needed", hint="see 'imagetool release --help'")
    path = resource_path(resource)
    pushed = parse_reference(source).transport != "path"
    if pushed and (destination is not None or signer is not None or version is not None):
        raise UsageError(
            f"{source} is an artifact already: DEST, --sign and --artifact-version are for encrypting",
            hint="copy it with imagetool copy, sign it with imagetool sign",
        )
    if not pushed and platform is not None:
        raise UsageError("--platform chooses in an image index, and SRC is none", hint="leave it out")
    if not pushed and destination is None:
        raise UsageError(f"{source} is no artifact, and DEST is missing", hint="say where to encrypt it to")
    with opened(broker) as opened_broker:
        if pushed:
            reference, policy = source, trust.policy()
        else:
            reference = str(destination)
            digest = _encrypt(terminal, opened_broker, path, Path(source), reference, signer, version, trust, registry)
            # What was made a moment ago, and nothing that somebody put there since.
            policy = TrustOptions(pin=digest).policy()
        from imagetool.broker.publishing import one_release, publish

        found = _checked(opened_broker, path, reference, platform, policy, registry)
        release = one_release([content for _, content in found])
        done = publish(opened_broker, path, release)
    for conflict in done.conflicts:
        terminal.warn(conflict)
    terminal.result(
        {
            "reference": reference,
            "resource": path,
            "id": release.artifact_id,
            "version": release.version,
            "artifacts": [
                {"platform": None if listed is None else str(listed), "content_digest": content.digest}
                for listed, content in found
            ],
            "floor_before": done.floor_before,
            "refused": [one.to_json() for one in done.refused],
        },
        _lines(reference, path, release, done),
    )


def _checked(
    broker: OpenedBroker,
    path: str,
    reference: str,
    platform: str | None,
    policy: TrustPolicy,
    registry: RegistryOptions,
) -> list[tuple[Platform | None, ContentDescriptor]]:
    """The artifact, or those of an index: each trusted, and opened by the key. Nobody signed the index itself."""
    from encfs.artifact import load_artifact
    from encfs.image.artifact import check_pin_names_one, for_each_artifact
    from imagetool.broker.publishing import held_provider, require_opens

    wanted = wanted_platform(platform)
    with held_provider(broker, path) as provider, opened_source(reference, registry) as store:

        def checked(manifest: RawManifest, listed: Platform | None) -> tuple[Platform | None, ContentDescriptor]:
            artifact = load_artifact(store, manifest)
            artifact.check_trust(policy)
            require_opens(artifact, provider)
            return listed, artifact.content

        document = store.document()
        check_pin_names_one(document, policy.pin, wanted)
        return list(for_each_artifact(store, document, checked, wanted))


def _encrypt(
    terminal: Terminal,
    broker: OpenedBroker,
    path: str,
    source: Path,
    destination: str,
    signer: str | None,
    version: int | None,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> str:
    """Encrypt to the broker's key; the content digest."""
    from encfs.keys.files import load_signing_key
    from encfs.oci.store import open_sink
    from encfs.trust import require_accepted
    from imagetool.broker.publishing import floor_of, held_binding, held_key
    from imagetool.pipeline.encrypt import EncryptOptions, encrypt

    if trust.artifact_id is None or trust != TrustOptions(artifact_id=trust.artifact_id):
        raise UsageError(
            "what is encrypted now needs --id NAME and no other trust option", hint="the line of releases it belongs to"
        )
    if signer is None:
        raise UsageError("--sign KEY is needed", hint="consumers accept a new version by its signature")
    key = load_signing_key(signer)
    if not source.exists():
        raise NotFoundError(f"{source} does not exist", hint="give an existing directory or file")
    if version is None:
        floor = floor_of(broker, path)
        version = 1 if floor is None else floor + 1
    # Before anything is written.
    line = held_binding(broker, path)
    require_accepted(line, artifact_id=trust.artifact_id, version=version, key_name=f"kbs:///{path}")
    recipient = held_key(broker, path)
    reference = parse_reference(destination)
    try:
        with closing(open_sink(reference, registry.store())) as sink, terminal.progress() as progress:
            made = encrypt(
                source,
                sink,
                [recipient],
                signers=[key],
                options=EncryptOptions(artifact_id=trust.artifact_id, version=version, adapt_frames=True),
                tag=reference.tag,
                progress=progress,
            )
    finally:
        recipient.wipe()
    return made.content.digest


def _lines(reference: str, path: str, release: Release, done: Publication) -> list[str]:
    before = "none" if done.floor_before is None else str(done.floor_before)
    now = release.version
    lines = [f"{reference}: {release.artifact_id} version {now} is released; floor of {path}: {before} -> {now}"]
    if not done.refused:
        return [*lines, "no consumer was given the key for anything older"]
    lines.append(f"{len(done.refused)} consumers are refused until they open version {now}:")
    for one in done.refused[:_SHOWN]:
        has = f"version {one.version}" if one.version is not None else one.content_digest or "content it did not name"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.released / 1000))
        lines.append(f"  {one.name} ({one.tee}, {one.client}): {has}, last on {when}")
    if len(done.refused) > _SHOWN:
        lines.append(f"  and {len(done.refused) - _SHOWN} more (--json lists all)")
    return lines
