"""`imagetool pull`."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.commandparts import CacheOptions, IndexPlatformOption, wanted_platform
from encfs.console.terminal import Terminal

if TYPE_CHECKING:
    from encfs.oci.blobs import Descriptor


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help="docker://HOST/REPOSITORY[:TAG]", show_default=False)],
    destination: Annotated[
        str | None,
        typer.Argument(metavar="TO", help="oci:PATH[:TAG]; the ciphertext cache if left out.", show_default=False),
    ] = None,
    platform: IndexPlatformOption = None,
    *,
    registry: CacheOptions,
) -> None:
    """Fetch an artifact whole into a layout or the cache. Called again after an interruption, it goes on."""
    from imagetool.cli.copying import check_transport, copy_reference

    check_transport(
        source, "docker", "pull takes docker://HOST/REPOSITORY[:TAG]; 'imagetool copy' takes any two places"
    )
    if destination is None:
        _fill_cache(terminal, source, platform, registry)
        return
    check_transport(destination, "oci", "pull goes to oci:PATH[:TAG]")
    copy_reference(terminal, source, destination, platform, registry.without_cache())


def _fill_cache(terminal: Terminal, reference: str, platform: str | None, registry: CacheOptions) -> None:
    import time

    from encfs.format.descriptor import parse_manifest
    from encfs.image.artifact import for_each_artifact
    from encfs.oci.cached import CachedSource
    from encfs.oci.prefetch import fill_cache, require_cache
    from encfs.oci.reference import parse_reference
    from encfs.units import format_duration, format_size
    from imagetool.pipeline.copy import artifact_blobs

    started = time.monotonic()
    options = registry.store()
    with closing(CachedSource(parse_reference(reference), options)) as source:
        require_cache(source)
        document = source.document()
        named = document.digest
        blobs: list[Descriptor] = []
        for one in for_each_artifact(source, document, lambda manifest, _: manifest, wanted_platform(platform)):
            blobs.extend(artifact_blobs(parse_manifest(one.content)))
            if platform is not None:
                named = one.digest
        with terminal.progress() as progress:
            result = fill_cache(source, blobs, progress)
    seconds = time.monotonic() - started
    fetched, size = format_size(result.fetched), format_size(result.size)
    terminal.result(
        {
            "source": reference,
            "cache_dir": options.cache_dir,
            "manifest_digest": named,
            "blobs": result.blobs,
            "size": result.size,
            "size_fetched": result.fetched,
            "seconds": round(seconds, 3),
        },
        [
            f"{options.cache_dir}: {result.blobs} blobs, {size}; {fetched} fetched in {format_duration(seconds)}",
            f"manifest        {named}",
        ],
    )
