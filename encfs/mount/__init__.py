"""Mount a volume's EROFS image as a read-only FUSE filesystem, list such mounts, and end them.

    volume → mount() → daemon: filesystem (pyfuse3, trio) + control socket
    mounts(), umount() → control socket, /proc/self/mountinfo

Not here: opening an artifact (`encfs.artifact`), output and exit codes (the command line).
"""

from encfs.mount.client import mounts, umount
from encfs.mount.daemon import mount
from encfs.mount.options import MountOptions, MountStatus

__all__ = ["MountOptions", "MountStatus", "mount", "mounts", "umount"]
