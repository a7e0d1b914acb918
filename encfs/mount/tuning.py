"""Settings of a mount that are made in /sys once it is there. Not here: mount options (`options`)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

_BDI = Path("/sys/class/bdi")
_KIB = 1024

log = logging.getLogger("encfs.mount")


def raise_read_ahead(device: int, size: int) -> int:
    """Have the kernel read ahead `size` bytes on a mount with this `st_dev`; sequential requests become as large.

    Returns the read-ahead in effect in bytes, 0 where it cannot be known. Needs write access to /sys (root outside of a
    restricted container); where that is missing the log says so, and the mount works, sequential reads being slower.
    """
    path = _BDI / f"{os.major(device)}:{os.minor(device)}" / "read_ahead_kb"
    try:
        current = int(path.read_text()) * _KIB
    except (OSError, ValueError) as error:
        log.info("the kernel's read-ahead is not known: %s", error)
        return 0
    if current >= size:
        return current
    try:
        path.write_text(f"{size // _KIB}\n")
    except OSError as error:
        log.info(
            "the kernel's read-ahead stays at %d KiB, since %s cannot be written (%s); %d would read files faster",
            current // _KIB,
            path,
            error.strerror,
            size // _KIB,
        )
        return current
    return size // _KIB * _KIB
