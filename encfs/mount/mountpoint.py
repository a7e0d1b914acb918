"""Mount points: which are ours, whether one is fit, unmounting, and clearing away what a killed daemon left behind.

Not here: daemons and their sockets (`client`, `daemon`).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from encfs.errors import MountError, NotMountedError
from encfs.mount.options import IMAGE_PREFIX, MOUNT_SOURCE

FUSE_TYPE = "fuse.encfs"
#: Types that a mount can have whose files a daemon of ours serves in the end.
_KERNEL_TYPES = frozenset({"overlay", "erofs"})
_MOUNTINFO = Path("/proc/self/mountinfo")
_FUSE_DEVICE = Path("/dev/fuse")
_FUSE_CONFIG = Path("/etc/fuse.conf")
_ESCAPE = re.compile(r"\\([0-7]{3})")
#: Dead mounts that are cleared from one place before giving up.
_MAX_STACKED = 16
#: Seconds that fusermount3 may take.
_FUSERMOUNT_TIMEOUT = 30
#: Seconds that a mount gets to answer whether it is alive.
_PATIENCE = 5.0
#: umount2(2).
_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

log = logging.getLogger("encfs.mount")


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of /proc/self/mountinfo (proc_pid_mountinfo(5)): what is used of it. `device` is `major:minor`."""

    mount_id: int
    device: str
    mountpoint: str
    options: str
    filesystem_type: str
    source: str

    @property
    def is_ours(self) -> bool:
        """FUSE mounts of ours, and what the kernel made of one: overlayfs, EROFS."""
        if self.filesystem_type in _KERNEL_TYPES:
            return self.source == MOUNT_SOURCE or self.source.startswith(IMAGE_PREFIX)
        return self.filesystem_type == FUSE_TYPE

    @property
    def is_fuse(self) -> bool:
        """Anybody's FUSE mount."""
        return self.filesystem_type.partition(".")[0] == "fuse"


def parse_mountinfo(text: str) -> list[MountInfo]:
    """All mounts in the order in which they were made; lines that do not fit are left out."""
    mounts = []
    for line in text.split("\n"):  # a mount point's name may hold what else `splitlines` takes for an end
        before, separator, after = line.partition(" - ")
        fields, more = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(more) < 2 or not fields[0].isdecimal():
            continue
        mounts.append(
            MountInfo(
                int(fields[0]), fields[2], _unescape(fields[4]), fields[5], _unescape(more[0]), _unescape(more[1])
            )
        )
    return mounts


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes: of space, tab, newline, backslash and hash sign, all ASCII."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)


def current_mounts() -> list[MountInfo]:
    """Every mount of this process's mount namespace."""
    return parse_mountinfo(os.fsdecode(_MOUNTINFO.read_bytes()))


def top_mount(mountpoint: str) -> MountInfo | None:
    """What is mounted at exactly this place, the last one where several are stacked."""
    found = None
    for mount in current_mounts():
        if mount.mountpoint == mountpoint:
            found = mount
    return found


def absolute(mountpoint: str | os.PathLike[str]) -> str:
    """The path as the kernel lists it: absolute, without symbolic links. A dead mount at its end does no harm."""
    parent, name = os.path.split(os.path.abspath(mountpoint))
    if not name:
        return parent
    path = os.path.join(os.path.realpath(parent), name)
    return os.path.realpath(path) if os.path.islink(path) else path


def is_dead(mountpoint: str) -> bool:
    """Whether the daemon of the mount is gone: then the kernel answers ENOTCONN to what it has no answer to itself.

    So it is asked for a name that it cannot know yet. What the kernel's EROFS knows of a directory it knows for ever.

    A daemon that is there and does not answer is not dead, and not waited for beyond some seconds.
    """
    found: list[int | None] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
            os.lstat(os.path.join(mountpoint, f".encfs-{secrets.token_hex(8)}"))
        except OSError as error:
            found.append(error.errno)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return found == [errno.ENOTCONN]


def prepare(mountpoint: str, is_abandoned: Callable[[str], bool]) -> None:
    """Make sure that a directory is there and nothing of ours is mounted on it; clear away what a killed daemon left.

    `is_abandoned` tells of a mount of ours whether its daemon is gone.

    Raises: MountError.
    """
    for _ in range(_MAX_STACKED):
        mount = top_mount(mountpoint)
        if mount is None or not (is_abandoned(mountpoint) if mount.is_ours else _is_dead_fuse(mount)):
            break
        if not mount.is_ours:
            raise MountError(
                f"{mountpoint} is a dead mount of another filesystem ({mount.filesystem_type})",
                hint=f"unmount it: umount -l {mountpoint}",
            )
        log.warning("clearing the mount that a killed daemon left at %s", mountpoint)
        unmount(mountpoint, lazy=True)
    try:
        mode = os.stat(mountpoint).st_mode
    except FileNotFoundError:
        raise MountError(
            f"the mount point {mountpoint} does not exist", hint=f"create it: mkdir -p {mountpoint}"
        ) from None
    except OSError as error:
        raise MountError(f"the mount point {mountpoint} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"the mount point {mountpoint} is no directory", hint="choose an empty directory")
    mount = top_mount(mountpoint)
    if mount is not None and mount.is_ours:
        raise MountError(f"{mountpoint} is already mounted", hint=f"unmount it first: encfs umount {mountpoint}")


def _is_dead_fuse(mount: MountInfo) -> bool:
    return mount.filesystem_type.startswith("fuse") and is_dead(mount.mountpoint)


def check_fuse(*, allow_other: bool) -> None:
    """Whether this user can mount through FUSE at all. Raises: MountError with what is missing."""
    try:
        os.close(os.open(_FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError(
            "FUSE is not available: /dev/fuse does not exist",
            hint="load the kernel module (modprobe fuse), or pass the device to the container",
        ) from None
    except OSError as error:
        if error.errno in {errno.ENODEV, errno.ENXIO}:
            raise MountError("FUSE is not available: the kernel has no FUSE support", hint="modprobe fuse") from None
        raise MountError(
            f"FUSE is not available: /dev/fuse cannot be opened: {error.strerror}",
            hint="the user needs read and write permission on /dev/fuse",
        ) from None
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is needed to mount without root and is not installed", hint="install fuse3")
    if allow_other and not _user_allow_other():
        raise MountError(
            "allow_other is not permitted to users on this machine",
            hint=f"add the line user_allow_other to {_FUSE_CONFIG}, or mount as root",
        )


def _user_allow_other() -> bool:
    try:
        lines = _FUSE_CONFIG.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


class BusyError(Exception):
    """umount(2) answered EBUSY. Turned into a MountError by whoever can say who holds it."""


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount what is on top at `mountpoint`; `lazy` detaches it even while it is in use.

    Raises: BusyError; NotMountedError; MountError.
    """
    if os.geteuid() == 0:
        _unmount_as_root(mountpoint, _MNT_DETACH if lazy else 0)
    else:
        _unmount_as_user(mountpoint, lazy=lazy)


def unmount_for_all(mountpoint: str) -> None:
    """Unmount a FUSE mount, and end its connection: what is open fails from now on, and its daemon ends. Root only.

    Raises: NotMountedError; MountError.
    """
    _unmount_as_root(mountpoint, _MNT_DETACH | _MNT_FORCE)


def unmount_stack(mountpoint: str) -> None:
    """All FUSE mounts of ours that lie upon one another there, as `unmount_for_all` does one. Root only.

    Raises: MountError.
    """
    for _ in current_mounts():
        mine = top_mount(mountpoint)
        if mine is None or not mine.is_ours:
            return
        unmount_for_all(mountpoint)


def _unmount_as_root(mountpoint: str, how: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | how
    if libc.umount2(os.fsencode(mountpoint), flags) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise BusyError
    if code in {errno.EINVAL, errno.ENOENT}:
        raise NotMountedError(f"nothing is mounted at {mountpoint}")
    raise MountError(f"{mountpoint} cannot be unmounted: {os.strerror(code)}")


def _unmount_as_user(mountpoint: str, *, lazy: bool) -> None:
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", mountpoint]
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            timeout=_FUSERMOUNT_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise MountError(
            "fusermount3 is needed to unmount without root and is not installed", hint="install fuse3"
        ) from None
    except OSError as error:
        raise MountError(f"{mountpoint} cannot be unmounted: fusermount3: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise MountError(f"{mountpoint} cannot be unmounted: fusermount3 does not answer") from None
    if done.returncode == 0:
        return
    message = " ".join(done.stderr.split()).removeprefix("fusermount3: ")
    if "busy" in message:
        raise BusyError
    if "not found" in message or "not mounted" in message:
        raise NotMountedError(f"nothing is mounted at {mountpoint}")
    raise MountError(f"{mountpoint} cannot be unmounted: {message or 'fusermount3 failed'}")
