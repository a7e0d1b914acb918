"""`imagetool release`."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandparts import RegistryOptions, TrustOptions, opened_source
from encfs.console.terminal import Terminal
from encfs.errors import NotFoundError, UsageError
from encfs.oci.reference import parse_reference
from imagetool.cli.broker.parts import opened, resource_path

if TYPE_CHECKING:
    from imagetool.broker.opening import OpenedBroker
    from imagetool.broker.publishing import Publication

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
        typer.Argument(metavar="[DEST]", help="Where to encrypt a directory or file to.", show_default=False),
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
        from encfs.artifact import load_artifact
        from imagetool.broker.publishing import publish

        with opened_source(reference, registry) as store:
            artifact = load_artifact(store)
            artifact.check_trust(policy)
            done = publish(opened_broker, path, artifact)
    for conflict in done.conflicts:
        terminal.warn(conflict)
    content = artifact.content
    terminal.result(
        {
            "reference": reference,
            "resource": path,
            "id": content.id,
            "version": content.version,
            "content_digest": content.digest,
            "floor_before": done.floor_before,
            "refused": [one.to_json() for one in done.refused],
        },
        _lines(reference, path, content.id, content.version, done),
    )


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
    from imagetool.broker.publishing import floor_of, held_key
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


def _lines(reference: str, path: str, artifact_id: str, version: int, done: Publication) -> list[str]:
    before = "none" if done.floor_before is None else str(done.floor_before)
    lines = [f"{reference}: {artifact_id} version {version} is released; floor of {path}: {before} -> {version}"]
    if not done.refused:
        return [*lines, "no consumer was given the key for anything older"]
    lines.append(f"{len(done.refused)} consumers are refused until they open version {version}:")
    for one in done.refused[:_SHOWN]:
        has = f"version {one.version}" if one.version is not None else one.content_digest or "content it did not name"
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(one.released / 1000))
        lines.append(f"  {one.name} ({one.tee}, {one.client}): {has}, last on {when}")
    if len(done.refused) > _SHOWN:
        lines.append(f"  and {len(done.refused) - _SHOWN} more (--json lists all)")
    return lines
