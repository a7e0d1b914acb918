"""`imagetool broker releases`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import UsageError
from encfs.strictjson import MAX_INTEGER
from imagetool.cli.broker.parts import DirectoryArgument, opened, resource_path


def command(
    terminal: Terminal,
    directory: DirectoryArgument,
    path: Annotated[
        str | None,
        typer.Option("--path", metavar="PATH", help="Only what is about this key.", show_default=False),
    ] = None,
    after: Annotated[
        int,
        typer.Option("--after", metavar="N", min=0, max=MAX_INTEGER, help="Only entries behind this sequence number."),
    ] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the whole chain instead, and print where it ends.")
    ] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="HEAD",
            help="With --verify: what it printed earlier must still be in the chain.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the log: what was released or refused, why, and what the owner changed."""
    if since is not None and not verify:
        raise UsageError("--since goes with --verify")
    if verify and (path is not None or after):
        raise UsageError("--verify checks the whole log", hint="leave out --path and --after")
    with opened(directory) as broker:
        from imagetool.broker import log

        if verify:
            earlier = log.parse_head(since) if since is not None else None
            epoch = broker.load_state().epoch
            with broker.database.reading() as connection:
                head = log.verify(connection, broker.vault, earlier, epoch=epoch)
            terminal.result(
                {"directory": directory, "entries": head.sequence, "head": str(head)},
                [f"{head.sequence} entries, each as it was written", f"head  {head}"],
            )
            return
        name = resource_path(path) if path is not None else None
        with broker.database.reading() as connection:

            def shown() -> Iterator[tuple[dict[str, object], str]]:
                for entry in log.entries(connection, path=name, after=after):
                    yield entry, _line(entry)

            terminal.stream({"directory": directory}, "entries", shown())


def _line(entry: dict[str, object]) -> str:
    moment = entry["time"]
    seconds = moment / 1000 if isinstance(moment, int) else 0
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    words = [f"{entry['sequence']:>6}", when, f"{entry['event']}", str(entry.get("path") or "-")]
    if entry.get("client") is not None:
        words.append(f"{entry['tee']} from {entry['client']}")
    if entry.get("version") is not None:
        words.append(f"version {entry['version']}")
    counts = entry.get("counts")
    if isinstance(counts, list):
        words += [f"{one.get('count')} more of {one.get('tee')} ({one.get('code')})" for one in counts]
    reasons = entry.get("reasons")
    if isinstance(reasons, list) and reasons:
        words.append("because " + "; ".join(str(one.get("message")) for one in reasons if isinstance(one, dict)))
    return "  ".join(words)
