"""`encfs advance`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.terminal import Terminal


def command(
    terminal: Terminal,
    index: Annotated[
        str, typer.Argument(metavar="INDEX", help="The counter's NV index, such as 0x01800100.", show_default=False)
    ],
) -> None:
    """Move an NV counter on: keys sealed to it open no more."""
    from encfs.tpm.availability import require_library
    from encfs.tpm.policy import parse_nv_index

    number = parse_nv_index(index)
    require_library()
    from encfs.tpm.counter import advance
    from encfs.tpm.storage import opened_storage

    with opened_storage() as storage:
        value = advance(storage, number)
    terminal.result(
        {"index": f"{number:#010x}", "value": value},
        [f"the NV counter {number:#010x} is at {value}: what was sealed to it before opens no more"],
    )
