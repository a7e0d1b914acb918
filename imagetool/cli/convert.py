"""`imagetool convert`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from encfs.console.commandline import value_option
from encfs.console.commandparts import (
    CacheOptions,
    KeyOptions,
    RegistryOptions,
    TrustOptions,
    opened_artifact,
    opened_source,
)
from encfs.console.terminal import Terminal
from encfs.errors import MissingKeyError, UsageError
from encfs.units import format_duration, format_size
from imagetool.cli.encrypting import MaxLayerSizeOption
from imagetool.cli.ocicrypt import KekOption, PlatformsOption, opened_keys, opened_recipients
from imagetool.cli.recipientkeys import ForWhat, recipient_keys

if TYPE_CHECKING:
    from encfs.oci.blobs import Descriptor
    from encfs.oci.reference import Reference

_FORMS = "oci:PATH[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY[:TAG]"


@dataclass(frozen=True, slots=True)
class _Job:
    """What was asked for, whichever way it goes."""

    source: str
    destination: str
    keys: Sequence[str]
    recipients: Sequence[str]
    platforms: Sequence[str]
    trust: TrustOptions
    registry: RegistryOptions


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What came of it. `content_digests` are null where the result is ocicrypt's. Sizes in bytes."""

    made: Literal["encfs", "ocicrypt"]
    manifest: Descriptor
    images: Sequence[tuple[str, int, str | None]]
    stored_size: int
    seconds: float


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="SRC", help=f"The encrypted image: {_FORMS}.", show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="DEST", help=f"Where the result goes: {_FORMS}.", show_default=False)
    ],
    recipients: Annotated[
        list[str] | None,
        value_option(
            "-r",
            "--recipient",
            metavar="RECIPIENT",
            help="Encrypt to this: as for 'encrypt', or for 'ocicrypt encrypt' where that comes out. Repeatable.",
        ),
    ] = None,
    keys: Annotated[
        list[str] | None,
        value_option(
            "-k",
            "--key",
            metavar="KEYURI",
            help="What opens SRC: as for 'ocicrypt decrypt', or for 'decrypt' of an artifact. Repeatable.",
        ),
    ] = None,
    kek: KekOption = None,
    platforms: PlatformsOption = None,
    signers: Annotated[
        list[str] | None,
        value_option("--sign", metavar="KEY", help="Sign the new artifact with this private key. Repeatable."),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option("--artifact-version", metavar="N", help="The new artifact's release.  [default: 0]"),
    ] = None,
    compression: Annotated[
        Literal["gzip", "none"] | None,
        value_option(
            "--layer-compression", metavar="gzip|none", help="How layers of ocicrypt are compressed.  [default: gzip]"
        ),
    ] = None,
    max_layer_size: MaxLayerSizeOption = None,
    *,
    trust: TrustOptions,
    registry: RegistryOptions,
) -> None:
    """Turn an ocicrypt image into an artifact, or back.

    Layers go through as streams: none is written decrypted.
    """
    from imagetool.ocicrypt.conversion import is_artifact

    if not keys:
        raise MissingKeyError("no key was given to open the image", hint="pass one with -k KEYURI")
    job = _Job(source, destination, keys, recipients or (), platforms or (), trust, registry)
    with opened_source(source, registry) as origin:
        to_ocicrypt = is_artifact(origin)
    if to_ocicrypt:
        if signers or version is not None or max_layer_size is not None:
            raise UsageError(
                f"{source} is an artifact, and an ocicrypt image comes of it",
                hint="--sign, --artifact-version and --max-layer-size are for the other way",
            )
        outcome = _to_ocicrypt(terminal, job, kek, compression or "gzip")
    else:
        if trust != TrustOptions(artifact_id=trust.artifact_id) or compression is not None or kek is not None:
            raise UsageError(
                f"{source} is no artifact, and one comes of it: nothing proves where it is from",
                hint="trust options (but for --id), --kek and --layer-compression are for the other way",
            )
        outcome = _to_artifact(terminal, job, signers or (), version or 0, max_layer_size)
    _report(terminal, job, outcome)


def _to_artifact(
    terminal: Terminal, job: _Job, signers: Sequence[str], version: int, max_layer_size: int | None
) -> _Outcome:
    from encfs.format.writer import VolumeOptions
    from encfs.image.manifest import parse_platform
    from encfs.keys.files import load_signing_key
    from encfs.oci.store import open_sink
    from imagetool.ocicrypt.conversion import DecryptingSource
    from imagetool.pipeline.encrypt_image import ImageOptions, encrypt_images
    from imagetool.sources.stored import load_images

    store, target = job.registry.store(), _target(job)
    signing = [load_signing_key(path) for path in signers]
    options = ImageOptions(job.trust.artifact_id, version, VolumeOptions(compress=True), max_layer_size)
    with (
        recipient_keys(terminal, job.recipients, None, [ForWhat(job.trust.artifact_id, version)]) as recipients,
        opened_keys(job.keys) as openers,
        opened_source(job.source, job.registry) as origin,
        closing(DecryptingSource(origin, openers, store.spool)) as plain,
    ):
        images = load_images(plain, [parse_platform(text) for text in job.platforms])
        with closing(open_sink(target, store)) as sink, terminal.progress() as progress:
            result = encrypt_images(
                images, sink, recipients, signers=signing, options=options, tag=target.tag, progress=progress
            )
    if not signing:
        terminal.note("not signed: readers must pin the content digest, or sign it with 'imagetool sign'")
    made = [(str(image.platform), image.layers, image.content.digest) for image in result.images]
    return _Outcome("encfs", result.manifest, made, result.stored_size, result.seconds)


def _to_ocicrypt(terminal: Terminal, job: _Job, kek: str | None, compression: str) -> _Outcome:
    from encfs.image.compression import Compression
    from encfs.image.manifest import Platform
    from encfs.oci.store import open_sink
    from imagetool.ocicrypt.conversion import EncryptingSink
    from imagetool.pipeline.decrypt_image import restore_image

    if len(job.platforms) > 1:
        raise UsageError("one platform at a time goes back to ocicrypt", hint="give --platform once")
    target = _target(job)
    cache = CacheOptions(**{item.name: getattr(job.registry, item.name) for item in fields(RegistryOptions)})
    with (
        opened_recipients(job.recipients, kek) as recipients,
        opened_artifact(
            terminal,
            job.source,
            KeyOptions(list(job.keys)),
            job.trust,
            cache,
            platform=job.platforms[0] if job.platforms else None,
            auxiliary=True,
        ) as artifact,
        closing(open_sink(target, job.registry.store())) as sink,
        terminal.progress() as progress,
    ):
        result = restore_image(
            artifact,
            EncryptingSink(sink, recipients),
            compression=Compression("" if compression == "none" else compression),
            tag=target.tag,
            progress=progress,
        )
    platform = Platform(result.config.os, result.config.architecture, result.config.variant)
    return _Outcome(
        "ocicrypt", result.manifest, [(str(platform), result.layers, None)], result.stored_size, result.seconds
    )


def _target(job: _Job) -> Reference:
    from encfs.oci.reference import parse_reference

    return parse_reference(job.destination)


def _report(terminal: Terminal, job: _Job, outcome: _Outcome) -> None:
    layers = sum(count for _, count, _ in outcome.images)
    size, took = format_size(outcome.stored_size), format_duration(outcome.seconds)
    kind = "artifact" if outcome.made == "encfs" else "ocicrypt image"
    lines = [
        f"{job.destination}: {kind}, {layers} layers, {size} in {took}",
        f"manifest        {outcome.manifest.digest}",
    ]
    lines += [f"content digest  {digest} ({platform})" for platform, _, digest in outcome.images if digest is not None]
    terminal.result(
        {
            "source": job.source,
            "destination": job.destination,
            "format": outcome.made,
            "manifest_digest": outcome.manifest.digest,
            "images": [
                {"platform": platform, "layers": count, "content_digest": digest}
                for platform, count, digest in outcome.images
            ],
            "stored_size": outcome.stored_size,
            "seconds": round(outcome.seconds, 3),
        },
        lines,
    )
