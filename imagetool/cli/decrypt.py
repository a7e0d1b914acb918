"""`imagetool decrypt`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Literal

import typer

from encfs.console.commandparts import (
    CacheOptions,
    KeyOptions,
    PlatformOption,
    ReferenceArgument,
    TrustOptions,
    extract_artifact,
    opened_artifact,
    origin_document,
)
from encfs.console.terminal import Terminal
from encfs.errors import UsageError
from encfs.units import format_duration, format_size

_DEFAULT_COMPRESSION: Literal["gzip"] = "gzip"


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    target: Annotated[
        str,
        typer.Argument(
            metavar="DEST",
            help="A directory that does not exist yet, or is empty; for an image oci:…, oci-archive:… or docker://….",
            show_default=False,
        ),
    ],
    layer_compression: Annotated[
        Literal["gzip", "zstd", "none"] | None,
        typer.Option(
            "--layer-compression",
            metavar="gzip|zstd|none",
            help="How an image's layers are compressed.  [default: gzip]",
            show_default=False,
        ),
    ] = None,
    *,
    platform: PlatformOption = None,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
) -> None:
    """Decrypt an artifact into a directory, or back to an image.

    Nothing appears there unless all of it verified.
    """
    from encfs.oci.reference import parse_reference

    if parse_reference(target).transport != "path":
        compression = layer_compression or _DEFAULT_COMPRESSION
        _restore(terminal, reference, target, compression, platform, keys, trust, registry)
        return
    if layer_compression is not None:
        raise UsageError("--layer-compression is for images", hint=f"write oci:{target} for one")
    extract_artifact(terminal, reference, target, keys, trust, registry, platform=platform)


def _restore(
    terminal: Terminal,
    reference: str,
    target: str,
    compression: str,
    platform: str | None,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
) -> None:
    from encfs.image.compression import Compression
    from encfs.image.manifest import Platform
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_sink
    from imagetool.pipeline.decrypt_image import check_restorable, restore_image

    destination = parse_reference(target)
    with opened_artifact(terminal, reference, keys, trust, registry, platform=platform, auxiliary=True) as artifact:
        # Before a layout is made.
        check_restorable(artifact)
        with closing(open_sink(destination, registry.store())) as sink, terminal.progress() as progress:
            result = restore_image(
                artifact,
                sink,
                compression=Compression("" if compression == "none" else compression),
                tag=destination.tag,
                progress=progress,
            )
    made_for = str(Platform(result.config.os, result.config.architecture, result.config.variant))
    took, size = format_duration(result.seconds), format_size(result.size)
    terminal.result(
        {
            "reference": reference,
            "destination": target,
            "content_digest": artifact.content_digest,
            "id": artifact.content.id,
            "version": artifact.content.version,
            "origin": origin_document(artifact.origin),
            "manifest_digest": result.manifest.digest,
            "platform": made_for,
            "layers": result.layers,
            "size": result.size,
            "stored_size": result.stored_size,
            "seconds": round(result.seconds, 3),
        },
        [
            f"{target}: {made_for}, {result.layers} layers, {size} in {took}",
            f"manifest        {result.manifest.digest}",
        ],
    )
