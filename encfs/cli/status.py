"""`encfs status`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from encfs.console.terminal import Terminal
from encfs.errors import MountError
from encfs.units import format_duration, format_size

if TYPE_CHECKING:
    from encfs.mount.options import MountStatus


def command(
    terminal: Terminal,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 40 unless something is mounted and everything serves.")
    ] = False,
) -> None:
    """List the mounts and their counters."""
    from encfs.mount.client import mounts

    found = mounts()
    if not found:
        terminal.note("nothing is mounted")
    if check and (not found or any(status.state != "serving" for status in found)):
        states = ", ".join(f"{status.mountpoint}: {status.state}" for status in found if status.state != "serving")
        raise MountError(f"not serving: {states or 'nothing is mounted'}")
    terminal.result({"mounts": [status.to_json() for status in found]}, _lines(found))


def _lines(found: list[MountStatus]) -> Iterator[str]:
    from encfs.mount.protocol import one_line

    for status in found:
        yield f"{status.mountpoint or '(mount point unknown)'}  {status.state}"
        if status.pid:
            running = (
                f", running for {format_duration(max(0.0, time.time() - status.started))}" if status.started else ""
            )
            yield f"    {status.reference} {status.content_digest}"
            yield f"    pid {status.pid}{running}"
        if status.reason:
            yield f"    restarts {status.restarts}: {one_line(status.reason)}"
        for counters in (status.stats, status.transfer):
            if any(counters.values()):
                yield "    " + ", ".join(_counter(name, value) for name, value in counters.items())
        if status.prefetch.get("mode", "none") != "none":
            yield f"    prefetch {_prefetch(status.prefetch)}"


def _prefetch(prefetch: Mapping[str, object]) -> str:
    done, total = (format_size(int(str(prefetch[name]))) for name in ("bytes_done", "bytes_total"))
    trouble = f": {prefetch['error']}" if prefetch["error"] else ""
    return f"{prefetch['state']}, {done} of {total}{trouble}"


def _counter(name: str, value: float) -> str:
    if name.startswith("seconds"):
        return f"{name.replace('_', ' ')} {value:.3g}"
    shown = format_size(int(value)) if name.startswith("bytes") or name.endswith(("bytes", "size")) else str(int(value))
    return f"{name.replace('_', ' ')} {shown}"
