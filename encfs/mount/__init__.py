"""Mount EROFS images through FUSE, by themselves or as layers, list such mounts, and end them.

    volumes → choose_shape() → mount() → daemon: filesystem (pyfuse3, trio) + control socket
    mounts(), umount() → control socket, /proc/self/mountinfo

Not here: opening an artifact (`encfs.artifact`), output and exit codes (the command line).

What is exported here is imported when it is asked for: some parts of this package have to be there quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from encfs.mount.client import mounts, umount
    from encfs.mount.daemon import mount
    from encfs.mount.options import MountOptions, MountStatus
    from encfs.mount.stacking import choose_shape

__all__ = ["MountOptions", "MountStatus", "choose_shape", "mount", "mounts", "umount"]

_MODULES = {
    "MountOptions": "options",
    "MountStatus": "options",
    "choose_shape": "stacking",
    "mount": "daemon",
    "mounts": "client",
    "umount": "client",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
