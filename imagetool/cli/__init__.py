"""The `imagetool` program: one module per command. Nothing imports this package but the program's entry point."""

from __future__ import annotations

from typing import NoReturn

from encfs.console import commandline
from imagetool.cli import (
    attest,
    broker,
    convert,
    copy,
    decrypt,
    encrypt,
    inspect,
    keygen,
    ls,
    ocicrypt,
    pull,
    push,
    recipients,
    release,
    sign,
    verify,
)

PROGRAM = "imagetool"

app = commandline.application(PROGRAM, "Make, check and manage encrypted artifacts.")
for _module in (keygen, encrypt, decrypt, inspect, ls, verify):
    commandline.add_module(app, _module)
app.add_typer(recipients.app)
for _module in (sign, copy, push, pull, release, convert):
    commandline.add_module(app, _module)
app.add_typer(ocicrypt.app)
app.add_typer(attest.app)
app.add_typer(broker.app)


def main() -> NoReturn:
    """Run the program with the arguments of the process."""
    commandline.main(app, PROGRAM)
