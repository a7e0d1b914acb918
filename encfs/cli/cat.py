"""`encfs cat`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from encfs.console.commandparts import (
    CacheOptions,
    KeyOptions,
    PlatformOption,
    ReferenceArgument,
    TrustOptions,
    opened_artifact,
)
from encfs.console.terminal import Terminal
from encfs.errors import UsageError


def command(
    terminal: Terminal,
    reference: ReferenceArgument,
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A regular file inside the artifact.", show_default=False)
    ],
    *,
    platform: PlatformOption = None,
    keys: KeyOptions,
    trust: TrustOptions,
    registry: CacheOptions,
) -> None:
    """Write one file of an artifact to standard output."""
    from encfs.browse import open_image, read_file

    if terminal.settings.json:
        raise UsageError("cat writes the file itself; there is nothing to print as JSON", hint="leave --json out")
    with opened_artifact(terminal, reference, keys, trust, registry, platform=platform) as artifact:
        for piece in read_file(open_image(artifact), os.fsencode(path)):
            terminal.write(piece)
