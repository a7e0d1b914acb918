"""Mount EROFS images through FUSE, by themselves or as layers, list such mounts, and end them.

    volumes → choose_shape() → mount() → daemon: filesystem (pyfuse3, trio) + control socket
    mounts(), umount() → control socket, /proc/self/mountinfo

Not here: opening an artifact (`encfs.artifact`), output and exit codes (the command line).
"""

from encfs.mount.client import mounts, umount
from encfs.mount.daemon import mount
from encfs.mount.options import MountOptions, MountStatus
from encfs.mount.stacking import choose_shape

__all__ = ["MountOptions", "MountStatus", "choose_shape", "mount", "mounts", "umount"]
