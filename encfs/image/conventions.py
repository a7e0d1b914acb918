"""How a layer says what it removes from those below: overlayfs's whiteouts and opaque directories.

(Linux, Documentation/filesystems/overlayfs.rst.) A whiteout is a character device 0:0, an opaque directory has the
attribute `trusted.overlay.opaque` with the value `y`. Everything else that overlayfs reads from attributes (redirects,
metacopy, origins, whiteouts in attributes) would let a layer name files of other layers: none of it is passed on.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

from encfs.erofs.tree import Inode

PREFIX = b"trusted.overlay."
#: What overlayfs reads in a user namespace instead (its option `userxattr`).
USER_PREFIX = b"user.overlay."
OPAQUE = PREFIX + b"opaque"


def is_whiteout(inode: Inode) -> bool:
    return stat.S_ISCHR(inode.mode) and inode.rdev == 0


def is_opaque(inode: Inode, xattrs: Mapping[bytes, bytes]) -> bool:
    """Whether a directory hides those of the same path below it."""
    return stat.S_ISDIR(inode.mode) and xattrs.get(OPAQUE) == b"y"


def shown_xattrs(xattrs: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The attributes of a file itself, without what they say about layers."""
    return {name: value for name, value in xattrs.items() if not name.startswith(PREFIX)}


def kernel_xattrs(inode: Inode, xattrs: Mapping[bytes, bytes], *, user: bool) -> dict[bytes, bytes]:
    """What the kernel's overlayfs may see of them: with `user` as it reads them in a user namespace."""
    kept = {name: value for name, value in shown_xattrs(xattrs).items() if not name.startswith(USER_PREFIX)}
    if is_opaque(inode, xattrs):
        kept[USER_PREFIX + b"opaque" if user else OPAQUE] = b"y"
    return kept
