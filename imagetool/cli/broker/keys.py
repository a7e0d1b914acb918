"""`imagetool broker key add|list|remove`."""

from __future__ import annotations

from typing import Annotated

import typer

from encfs.console.commandline import add_command
from encfs.console.terminal import Terminal
from encfs.errors import KeyFileError, UsageError
from imagetool.cli.broker.parts import DirectoryArgument, ResourceArgument, add_key, changed, opened, resource_path

app = typer.Typer(name="key", help="The keys that the broker releases.", rich_markup_mode=None)


def add(
    terminal: Terminal,
    directory: DirectoryArgument,
    path: ResourceArgument,
    kek: Annotated[
        str | None,
        typer.Option(
            "--kek",
            metavar="FILE",
            help="The symmetric key (JWK of type oct, or base64) that artifacts are encrypted to.",
            show_default=False,
        ),
    ] = None,
    opaque: Annotated[
        str | None,
        typer.Option(
            "--opaque", metavar="FILE", help="Any bytes, released as they are and without refusals.", show_default=False
        ),
    ] = None,
) -> None:
    """Put a key into the broker. Who gets it is the policy's to say."""
    from encfs.kbs.protocol import MAX_RESOURCE
    from encfs.keys.files import load_decryption_key, read_key_file
    from encfs.keys.secrets import SymmetricKey, wipe

    name = resource_path(path)
    if (kek is None) == (opaque is None):
        raise UsageError("give either --kek FILE or --opaque FILE", hint="make a key: imagetool keygen --type oct")
    with opened(directory) as broker:
        from imagetool.broker import state

        if kek is not None:
            key = load_decryption_key(kek)
            if not isinstance(key, SymmetricKey):
                raise KeyFileError(
                    f"{kek} is a private key; the broker binds symmetric keys to artifacts",
                    hint="imagetool keygen --type oct, or --opaque FILE to release it as it is",
                )
            content, kind, access = bytearray(key.secret), state.KEY, None
            key.wipe()
        else:
            content, access = read_key_file(str(opaque))
            kind = state.OPAQUE
        try:
            if access is not None:
                access.check()
            if not 0 < len(content) <= MAX_RESOURCE:
                raise UsageError("the resource is empty or too large")
            rule = add_key(terminal, broker, name, kind, content)
        finally:
            wipe(content)
    terminal.result(
        {"path": name, "uri": f"kbs:///{name}", "kind": kind, "rule": rule.pattern if rule is not None else None},
        [f"kbs:///{name}: added" + (f", under the rule {rule.pattern}" if rule is not None else "")],
    )


def list_keys(terminal: Terminal, directory: DirectoryArgument) -> None:
    """List the keys, with their floors and how often each was released."""
    with opened(directory) as broker:
        from sqlalchemy import select

        from imagetool.broker.tables import RESOURCES

        current = broker.load_state()
        with broker.database.reading() as connection:
            counts = {
                row.path: row.releases for row in connection.execute(select(RESOURCES.c.path, RESOURCES.c.releases))
            }
    keys: list[dict[str, object]] = []
    lines: list[str] = []
    for name, entry in sorted(current.entries.items()):
        rule = current.policy.rule_for(name)
        pattern = rule.pattern if rule is not None else None
        keys.append(
            {
                "path": name,
                "kind": entry.kind,
                "rule": pattern,
                "artifact_id": entry.artifact_id,
                "min_version": entry.min_version,
                "releases": counts.get(name, 0),
            }
        )
        floor = f", {entry.artifact_id} from version {entry.min_version}" if entry.artifact_id is not None else ""
        lines.append(f"{name}  {entry.kind}, rule {pattern or 'none'}{floor}, released {counts.get(name, 0)} times")
    terminal.result({"directory": directory, "keys": keys}, lines)


def remove(terminal: Terminal, directory: DirectoryArgument, path: ResourceArgument) -> None:
    """Remove a key from the broker. Who was given it may have kept it."""
    name = resource_path(path)
    with opened(directory) as broker:
        from imagetool.broker import state

        changed(broker, "key-removed", name, lambda connection: (state.remove_key(connection, broker.vault, name), {}))
    terminal.result({"path": name}, [f"kbs:///{name}: removed"])


add_command(app, "add", add)
add_command(app, "list", list_keys)
add_command(app, "remove", remove)
