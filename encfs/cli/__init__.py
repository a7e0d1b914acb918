"""The `encfs` program: one module per command. Nothing imports this package but the program's entry point."""

from __future__ import annotations

from typing import NoReturn

from encfs import commandline
from encfs.cli import (
    advance,
    approve,
    attest,
    cat,
    csi_node,
    extract,
    ls,
    mount,
    providers,
    run,
    seal,
    sidecar,
    status,
    umount,
    unseal,
)

PROGRAM = "encfs"

app = commandline.application(PROGRAM, "Mount and read encrypted, verified artifacts.")
for _module in (
    mount,
    run,
    umount,
    status,
    ls,
    cat,
    extract,
    seal,
    unseal,
    approve,
    advance,
    providers,
    sidecar,
    csi_node,
):
    commandline.add_module(app, _module)
app.add_typer(attest.app)


def main() -> NoReturn:
    """Run the program with the arguments of the process."""
    commandline.main(app, PROGRAM)
