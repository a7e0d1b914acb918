"""`imagetool push`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandparts import IndexPlatformOption, RegistryOptions
from encfs.console.terminal import Terminal


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help="oci:PATH[:TAG]", show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="TO", help="docker://HOST/REPOSITORY[:TAG]", show_default=False)
    ],
    platform: IndexPlatformOption = None,
    *,
    registry: RegistryOptions,
) -> None:
    """Copy an artifact from a layout to a registry. Called again after an interruption, it skips what is there."""
    from imagetool.cli.copying import check_transport, copy_reference

    check_transport(source, "oci", "push takes oci:PATH[:TAG]; 'imagetool copy' takes any two places")
    check_transport(destination, "docker", "push goes to docker://HOST/REPOSITORY[:TAG]")
    copy_reference(terminal, source, destination, platform, registry)
