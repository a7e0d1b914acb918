"""`imagetool pull`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.commandparts import RegistryOptions
from encfs.terminal import Terminal


def command(
    terminal: Terminal,
    source: Annotated[str, typer.Argument(metavar="FROM", help="docker://HOST/REPOSITORY[:TAG]", show_default=False)],
    destination: Annotated[str, typer.Argument(metavar="TO", help="oci:PATH[:TAG]", show_default=False)],
    registry: RegistryOptions,
) -> None:
    """Copy an artifact from a registry to a layout. Called again after an interruption, it goes on where it stopped."""
    from imagetool.cli.copying import check_transport, copy_reference

    check_transport(
        source, "docker", "pull takes docker://HOST/REPOSITORY[:TAG]; 'imagetool copy' takes any two places"
    )
    check_transport(destination, "oci", "pull goes to oci:PATH[:TAG]")
    copy_reference(terminal, source, destination, registry)
