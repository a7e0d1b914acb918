"""Mount system calls that Python does not have, with the kernel's own words where one fails.

mount(2), fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2), mount_setattr(2), unshare(2), pivot_root(2).
A mount that was made but not yet attached is a descriptor; closing it unmounts. Not here: what is mounted and where.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from encfs.errors import MountError

#: linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
#: linux/capability.h
_CAP_SYS_ADMIN = 21
#: linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
ATTR_RDONLY = 1
ATTR_NOSUID = 2
ATTR_NODEV = 4
ATTR_NOEXEC = 8
MNT_DETACH = 2

#: The same on all architectures (but alpha).
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 442
_FSOPEN_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CMD_CREATE = 0, 1, 6
_FSMOUNT_CLOEXEC = 1
_OPEN_TREE_CLONE = 1
_AT_RECURSIVE = 0x8000
_AT_EMPTY_PATH = 0x1000
_AT_FDCWD = -100
_FROM_EMPTY_PATH = 4
#: struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
_MOUNT_ATTR = struct.Struct("=QQQQ")
_MAX_SAID = 4096

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, function: int | str, *arguments: object) -> int:
    """One system call by number, or a function of the C library. Raises: MountError."""
    ctypes.set_errno(0)
    if isinstance(function, int):
        result = _libc.syscall(ctypes.c_long(function), *(_argument(one) for one in arguments))
    else:
        result = getattr(_libc, function)(*(_argument(one) for one in arguments))
    if result < 0:
        raise MountCallError(what, ctypes.get_errno())
    return int(result)


def _argument(value: object) -> object:
    if isinstance(value, str):
        return ctypes.c_char_p(os.fsencode(value))
    return ctypes.c_long(value) if isinstance(value, int) else value


class MountCallError(MountError):
    """A mount system call failed; `errno` says how."""

    def __init__(self, what: str, errno: int = 0, *, hint: str | None = None) -> None:
        super().__init__(f"{what}: {os.strerror(errno)}" if errno else what, hint=hint)
        self.errno = errno

    def __reduce__(self) -> tuple[object, ...]:
        return MountError, (self.message,)


def unshare(flags: int) -> None:
    """Raises: MountCallError."""
    _call("no namespace can be made here", "unshare", flags)


def enter_private_namespace() -> None:
    """Give the calling thread a mount namespace of its own; what is mounted in it is seen by nobody else."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE, "")


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    """mount(2). Raises: MountCallError."""
    _call(f"{kind or 'a mount'} cannot be mounted", "mount", source, target, kind, flags, options)


def unmount(target: str) -> None:
    """Detach what is on top of a path, also where it is in use. Raises: MountCallError."""
    _call(f"{target} cannot be unmounted", "umount2", target, MNT_DETACH)


def pivot_root(new: str, old: str) -> None:
    """Raises: MountCallError."""
    _call("the root directory cannot be changed", "pivot_root", new, old)


def new_mount(kind: str, options: Mapping[str, str | None], attributes: int) -> int:
    """A new filesystem of this kind, mounted nowhere; a value of None makes an option a flag. The descriptor.

    Raises: MountCallError with what the kernel says.
    """
    what = f"{kind} cannot be mounted"
    context = _call(what, _FSOPEN, kind, _FSOPEN_CLOEXEC)
    try:
        for name, value in options.items():
            if value is None:
                _call(f"{what}: {name}", _FSCONFIG, context, _SET_FLAG, name, None, 0)
            else:
                _call(f"{what}: {name}", _FSCONFIG, context, _SET_STRING, name, value, 0)
        _call(what, _FSCONFIG, context, _CMD_CREATE, None, None, 0)
        return _call(what, _FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
    except MountCallError as error:
        said = _said(context)
        raise MountCallError(f"{error.message}: {said}" if said else error.message) from None
    finally:
        os.close(context)


def _said(context: int) -> str:
    """What the kernel logged about a filesystem that is being made (fsopen(2))."""
    with suppress(OSError):
        return os.read(context, _MAX_SAID).decode(errors="replace").partition("\n")[0].partition(" ")[2]
    return ""


def attach(mounted: int, target: str) -> None:
    """Mount what a descriptor stands for at a path. Raises: MountCallError."""
    _call(f"nothing can be mounted on {target}", _MOVE_MOUNT, mounted, "", _AT_FDCWD, target, _FROM_EMPTY_PATH)


def clone_mount(path: str, *, recursive: bool = False) -> int:
    """A further mount of what is at `path`, mounted nowhere: a descriptor. Raises: MountCallError."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return _call(f"{path} cannot be bound", _OPEN_TREE, _AT_FDCWD, path, flags)


def set_attributes(mounted: int, attributes: int, *, recursive: bool = False) -> None:
    """Add attributes to a mount by its descriptor. Raises: MountCallError."""
    value = ctypes.create_string_buffer(_MOUNT_ATTR.pack(attributes, 0, 0, 0), _MOUNT_ATTR.size)
    flags = _AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)
    _call("a mount cannot be restricted", _MOUNT_SETATTR, mounted, "", flags, value, _MOUNT_ATTR.size)


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def may_mount() -> bool:
    """Whether this process may mount anything in its own mount namespace."""
    with open("/proc/self/status") as file:
        text = file.read()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_ADMIN & 1)
    return False
