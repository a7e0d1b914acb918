"""Where the programs of this package start: before anything is loaded that takes time. Not here: the programs."""

from __future__ import annotations

import signal
from typing import NoReturn


def end_quietly() -> None:
    """Until commands handle it (`encfs.console.terminal.run`), Ctrl-C ends the process as it does any other program.

    Python's own way is a traceback through whatever was being imported just then.
    """
    # Who started it may have had it ignored on purpose.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def main() -> NoReturn:
    """`encfs`."""
    end_quietly()
    from encfs.cli import main as run

    run()


def mount_helper() -> NoReturn:
    """`mount.fuse.encfs`."""
    end_quietly()
    from encfs.cli.fstab import main as run

    run()
