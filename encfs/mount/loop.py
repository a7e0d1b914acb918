"""Loop devices that end by themselves: for kernels that cannot mount an image from a file (loop(4))."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from encfs.errors import MountError

#: linux/loop.h
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
#: struct loop_config: fd, block size; struct loop_info64: device, inode, rdevice, offset, size limit, number,
#: encryption type and key size, flags, names and key, init; then reserved.
_CONFIG = struct.Struct("=II QQQQQ IIII 64s 64s 32s QQ 64x")
#: Others may take the free device first.
_ATTEMPTS = 16


@contextmanager
def attached(path: str) -> Iterator[str]:
    """A read-only loop device over a file: its path. It ends with its last user, at the latest at the end of this.

    Raises: MountError.
    """
    try:
        backing = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            device, name = _configure(backing)
        finally:
            os.close(backing)
    except OSError as error:
        raise MountError(
            f"no loop device can be had: {error.strerror}", hint="modprobe loop, or mount with --backend fuse"
        ) from None
    try:
        yield name
    finally:
        os.close(device)


def _configure(backing: int) -> tuple[int, str]:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            flags = _READ_ONLY | _AUTOCLEAR | _DIRECT_IO
            config = _CONFIG.pack(backing, 0, 0, 0, 0, 0, 0, 0, 0, 0, flags, b"encfs", b"", b"", 0, 0)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device, name
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
