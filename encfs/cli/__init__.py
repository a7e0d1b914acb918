"""The `encfs` program: one module per command. Nothing imports this package but the program's entry point."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from encfs.console import commandline

if TYPE_CHECKING:
    import typer

    app: typer.Typer

PROGRAM = "encfs"

#: Objects made until the garbage collector looks at the young ones: starting makes many, and hardly any garbage.
_ALLOCATIONS = 20_000

_COMMANDS = (
    "mount",
    "run",
    "umount",
    "status",
    "ls",
    "cat",
    "extract",
    "seal",
    "unseal",
    "approve",
    "advance",
    "providers",
    "sidecar",
    "csi-node",
    "attest",
)


def application(words: Sequence[str] = ()) -> typer.Typer:
    """The program; where `words` begin with the name of a command, this one alone, since the others take time."""
    return commandline.assemble(PROGRAM, "Mount and read encrypted, verified artifacts.", __name__, _COMMANDS, words)


def __getattr__(name: str) -> object:
    """All of the program, as `app`: made when it is asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = application()
    return globals()[name]


def main() -> NoReturn:
    """Run the program with the arguments of the process."""
    gc.set_threshold(_ALLOCATIONS)
    commandline.main(application(sys.argv[1:]), PROGRAM)
