"""`imagetool copy`."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from encfs.commandparts import opened_source
from encfs.terminal import Terminal
from encfs.units import format_size


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help="oci:PATH[:TAG]", show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="TO", help="oci:PATH[:TAG]", show_default=False)],
) -> None:
    """Copy an artifact as it is; needs no key. Every blob's digest is checked on the way, present ones are skipped."""
    from encfs.oci.reference import parse_reference
    from encfs.oci.store import open_sink
    from imagetool.pipeline.copy import copy_artifact

    target = parse_reference(destination)
    with opened_source(source) as origin, closing(open_sink(target)) as sink, terminal.progress() as progress:
        result = copy_artifact(origin, sink, tag=target.tag, progress=progress)
    terminal.result(
        {
            "source": source,
            "destination": destination,
            "manifest_digest": result.manifest.digest,
            "blobs_copied": result.copied,
            "blobs_present": result.present,
            "size_copied": result.copied_size,
        },
        [
            f"{destination}: {result.copied} blobs copied, {format_size(result.copied_size)}; {result.present} present",
            f"manifest        {result.manifest.digest}",
        ],
    )
