"""Who keeps a mount busy, as far as this user may see it: a scan of /proc, bounded in time.

Not here: unmounting (`mountpoint`). Paths are compared, the mount itself is not touched: its daemon may not answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_SECONDS = 2.0
_HOLDERS = 5
_MAPS_SIZE = 4 << 20


def find_holders(mountpoint: str) -> list[str]:
    """`PID (name)` of up to five processes with a directory, an open or a mapped file at or below `mountpoint`."""
    deadline = time.monotonic() + _SECONDS
    holders: list[str] = []
    for entry in os.scandir(_PROC):
        if time.monotonic() > deadline or len(holders) == _HOLDERS:
            break
        if entry.name.isdecimal() and _holds(Path(entry.path), mountpoint):
            holders.append(f"{entry.name} ({_name(Path(entry.path))})")
    return holders


def _holds(process: Path, mountpoint: str) -> bool:
    below = mountpoint.rstrip("/") + "/"
    return any(path == mountpoint or path.startswith(below) for path in _paths(process))


def _paths(process: Path) -> Iterator[str]:
    """Every path that the process refers to. Processes end and forbid looking: what cannot be read is left out."""
    for name in ("cwd", "root", "exe"):
        yield from _link(process / name)
    try:
        descriptors = os.listdir(process / "fd")
    except OSError:
        descriptors = []
    for descriptor in descriptors:
        yield from _link(process / "fd" / descriptor)
    try:
        with open(process / "maps", "rb") as maps:
            for line in maps.read(_MAPS_SIZE).splitlines():
                fields = line.split(None, 5)
                if len(fields) == 6:
                    yield os.fsdecode(fields[5])
    except OSError:
        return


def _link(path: Path) -> Iterator[str]:
    try:
        yield os.readlink(path)
    except OSError:
        return


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text(errors="replace").strip()
    except OSError:
        return "ended"
