"""What `copy`, `push` and `pull` share: one copy between two stores, and what is said about it."""

from __future__ import annotations

import time
from contextlib import closing

from encfs.console.commandparts import RegistryOptions, opened_source, wanted_platform
from encfs.console.terminal import Terminal
from encfs.errors import UsageError
from encfs.oci.reference import Transport, parse_reference
from encfs.units import format_duration, format_size


def check_transport(reference: str, transport: Transport, hint: str) -> None:
    """Raises: UsageError where a reference is of another transport."""
    if parse_reference(reference).transport != transport:
        raise UsageError(f"{reference} is not of the form {transport}:…", hint=hint)


def copy_reference(
    terminal: Terminal, source: str, destination: str, platform: str | None, registry: RegistryOptions
) -> None:
    """Copy an artifact between stores and print the outcome. Raises: UsageError, what the stores raise."""
    from encfs.oci.store import open_sink
    from imagetool.pipeline.copy import check_copyable, copy_artifact

    started = time.monotonic()
    target, wanted = parse_reference(destination), wanted_platform(platform)
    options = registry.store()
    with opened_source(source, registry) as origin:
        # Before anything is made at the destination.
        check_copyable(origin, origin.document(), wanted)
        with closing(open_sink(target, options)) as sink, terminal.progress() as progress:
            result = copy_artifact(
                origin, sink, tag=target.tag, wanted=wanted, progress=progress, concurrency=options.concurrency
            )
    seconds = time.monotonic() - started
    size, took = format_size(result.copied_size), format_duration(seconds)
    terminal.result(
        {
            "source": source,
            "destination": destination,
            "manifest_digest": result.manifest.digest,
            "blobs_copied": result.copied,
            "blobs_present": result.present,
            "size_copied": result.copied_size,
            "seconds": round(seconds, 3),
        },
        [
            f"{destination}: {result.copied} blobs copied, {size} in {took}; {result.present} present",
            f"manifest        {result.manifest.digest}",
        ],
    )
