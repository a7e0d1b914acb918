"""The `imagetool` program: one module per command. Nothing imports this package but the program's entry point."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from encfs.console import commandline

if TYPE_CHECKING:
    import typer

    app: typer.Typer

PROGRAM = "imagetool"

_COMMANDS = (
    "keygen",
    "encrypt",
    "decrypt",
    "inspect",
    "ls",
    "verify",
    "recipients",
    "sign",
    "copy",
    "push",
    "pull",
    "release",
    "convert",
    "ocicrypt",
    "attest",
    "broker",
)


def application(words: Sequence[str] = ()) -> typer.Typer:
    """The program; where `words` begin with the name of a command, this one alone, since the others take time."""
    about = "Make, check and manage encrypted artifacts."
    return commandline.assemble(PROGRAM, about, __name__, _COMMANDS, words)


def __getattr__(name: str) -> object:
    """All of the program, as `app`: made when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = application()
    return globals()[name]


def main() -> NoReturn:
    """Run the program with the arguments of the process."""
    commandline.main(application(sys.argv[1:]), PROGRAM)
