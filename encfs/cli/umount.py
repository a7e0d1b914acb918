"""`encfs umount`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.terminal import Terminal


def command(
    terminal: Terminal,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The mount point.", show_default=False)],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Detach it now; it ends with the last process that uses it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="End it now; open files fail.")] = False,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long to wait for its daemon to end.")
    ] = 10.0,
) -> None:
    """Unmount, and return once nothing is left behind."""
    from encfs.mount.client import umount
    from encfs.mount.mountpoint import absolute

    place = absolute(directory)
    umount(place, timeout=timeout, lazy=lazy, force=force)
    terminal.result({"mountpoint": place})
