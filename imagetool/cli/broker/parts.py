"""What the broker's commands share: the directory, an opened broker, changes that are logged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from imagetool.broker.opening import OpenedBroker
    from imagetool.broker.policy import Rule
    from imagetool.broker.state import State

DirectoryArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="The broker's directory, which init made.", show_default=False)
]
ResourceArgument = Annotated[
    str,
    typer.Argument(metavar="PATH", help="The key's name: REPOSITORY/TYPE/TAG.", show_default=False),
]


def require_packages() -> None:
    """Raises: UnsupportedError where the extra is not installed."""
    from importlib.util import find_spec

    for name in ("sqlalchemy", "alembic", "starlette", "uvicorn", "uvloop", "httptools", "prometheus_client"):
        if find_spec(name) is None:
            raise UnsupportedError(f"the broker needs {name}", hint="pip install 'encfs[broker]'")


@contextmanager
def opened(directory: str) -> Iterator[OpenedBroker]:
    """Raises: as `open_broker`."""
    require_packages()
    from encfs.hardening import protect_keys
    from imagetool.broker.opening import open_broker

    protect_keys()
    broker = open_broker(Path(directory))
    try:
        yield broker
    finally:
        broker.database.close()


def resource_path(text: str) -> str:
    """A resource's path, also written as `kbs:///PATH`. Raises: UsageError."""
    from encfs.errors import FormatError
    from encfs.kbs.protocol import parse_path

    try:
        return str(parse_path(text.removeprefix("kbs:///")))
    except FormatError as error:
        raise UsageError(error.message, hint="such as default/key/chat") from None


def changed(
    broker: OpenedBroker,
    event: str,
    path: str,
    change: Callable[[Connection], tuple[State, Mapping[str, object]]],
) -> State:
    """Make a change of the owner's: in one transaction with its entry in the log, then the mark of the epoch."""
    from imagetool.broker import log

    broker.check_mark()
    with broker.database.transaction() as connection:
        state, members = change(connection)
        log.append(
            connection,
            broker.vault,
            time=broker.database.now(connection),
            event=event,
            path=path,
            members={"epoch": state.epoch, **members},
        )
    broker.settle(state)
    return state


def add_key(terminal: Terminal, broker: OpenedBroker, path: str, kind: str, content: bytes | bytearray) -> Rule | None:
    """Put a key, which the caller wipes, into the broker: the rule that it is under. Raises: ConflictError."""
    from imagetool.broker import state

    def change(connection: Connection) -> tuple[State, Mapping[str, object]]:
        now = broker.database.now(connection)
        return state.add_key(connection, broker.vault, path, kind, content, now), {"kind": kind}

    rule = changed(broker, "key-added", path, change).policy.rule_for(path)
    if rule is None:
        terminal.warn(f"no rule of the policy is for {path}: nobody gets it")
    return rule
