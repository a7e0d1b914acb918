"""`imagetool pull`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from encfs.commandparts import CacheOptions
from encfs.terminal import Terminal


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help="docker://HOST/REPOSITORY[:TAG]", show_default=False)],
    destination: Annotated[
        str | None,
        typer.Argument(metavar="TO", help="oci:PATH[:TAG]; the ciphertext cache if left out.", show_default=False),
    ] = None,
    *,
    registry: CacheOptions,
) -> None:
    """Fetch an artifact whole into a layout or the cache. Called again after an interruption, it goes on."""
    from imagetool.cli.copying import check_transport, copy_reference

    check_transport(
        source, "docker", "pull takes docker://HOST/REPOSITORY[:TAG]; 'imagetool copy' takes any two places"
    )
    if destination is None:
        _fill_cache(terminal, source, registry)
        return
    check_transport(destination, "oci", "pull goes to oci:PATH[:TAG]")
    copy_reference(terminal, source, destination, registry.without_cache())


def _fill_cache(terminal: Terminal, reference: str, registry: CacheOptions) -> None:
    import time

    from encfs.format.descriptor import parse_manifest
    from encfs.oci.cached import CachedSource
    from encfs.oci.prefetch import fill_cache, require_cache
    from encfs.oci.reference import parse_reference
    from encfs.units import format_duration, format_size

    started = time.monotonic()
    options = registry.store()
    with closing(CachedSource(parse_reference(reference), options)) as source:
        require_cache(source)
        manifest = source.manifest()
        parsed = parse_manifest(manifest.content)
        with terminal.progress() as progress:
            result = fill_cache(source, (parsed.config, *parsed.blobs), progress)
    seconds = time.monotonic() - started
    fetched, size = format_size(result.fetched), format_size(result.size)
    terminal.result(
        {
            "source": reference,
            "cache_dir": options.cache_dir,
            "manifest_digest": manifest.digest,
            "blobs": result.blobs,
            "size": result.size,
            "size_fetched": result.fetched,
            "seconds": round(seconds, 3),
        },
        [
            f"{options.cache_dir}: {result.blobs} blobs, {size}; {fetched} fetched in {format_duration(seconds)}",
            f"manifest        {manifest.digest}",
        ],
    )
