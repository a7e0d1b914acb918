"""`imagetool copy`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandparts import IndexPlatformOption, MirrorOptions
from encfs.console.terminal import Terminal

_FORMS = "oci:PATH[:TAG], oci-archive:FILE[:TAG] or docker://HOST/REPOSITORY[:TAG]"


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help=_FORMS, show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="TO", help=_FORMS, show_default=False)],
    platform: IndexPlatformOption = None,
    *,
    registry: MirrorOptions,
) -> None:
    """Copy an artifact as it is; needs no key. Every blob's digest is checked on the way, present ones are skipped."""
    from imagetool.cli.copying import copy_reference

    copy_reference(terminal, source, destination, platform, registry)
