"""Where the program of this package starts: before anything is loaded that takes time. Not here: the program."""

from __future__ import annotations

from typing import NoReturn

from encfs.start import end_quietly


def main() -> NoReturn:
    """`imagetool`."""
    end_quietly()
    from imagetool.cli import main as run

    run()
