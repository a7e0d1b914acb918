"""/dev/fuse by hand: open it, mount with it, look at what was handed over, keep a connection while daemons change.

A FUSE connection lives as long as a descriptor of it is open. Whoever keeps one can have another process answer where
the last one stopped, if that process knows what was negotiated in the beginning. Layouts are those of linux/fuse.h.
Not here: requests other than the first (`filesystem`), who keeps descriptors (`keeper`).
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import select
import socket
import stat
import struct
import subprocess
import time
from pathlib import Path

from encfs.errors import MountError
from encfs.mount.mountpoint import FUSE_TYPE
from encfs.mount.options import MOUNT_SOURCE, MountOptions

_DEVICE = "/dev/fuse"
#: The device's number: misc, 229 (Documentation/admin-guide/devices.txt).
DEVICE_NUMBER = os.makedev(10, 229)
#: The minor number in the kernel's own dev_t (MINORBITS of linux/kdev_t.h).
_MINOR = (1 << 20) - 1
#: Bytes that a first request fits in; the kernel refuses smaller reads (FUSE_MIN_READ_BUFFER).
_ROOM = 64 << 10
#: struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding.
_REQUEST = struct.Struct("=IIQQIIIHH")
#: struct fuse_out_header: len, error, unique.
_REPLY = struct.Struct("=IiQ")
#: struct fuse_init_in: major, minor, max_readahead, flags, flags2.
_INIT = struct.Struct("=IIIII")
_OPCODE_INIT = 26
#: Requests that get no answer: FORGET, INTERRUPT, BATCH_FORGET.
_UNANSWERED = frozenset({2, 36, 42})
#: FUSE_HAS_RESEND is bit 39 of the flags, thus bit 7 of `flags2` (Linux 6.9).
_HAS_RESEND = 1 << 7
#: FUSE_NOTIFY_RESEND of enum fuse_notify_code.
_NOTIFY_RESEND = 7
#: FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t).
_CLONE = 0x8004E500
#: mount(2).
_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
#: Seconds that fusermount3 may take.
_FUSERMOUNT_TIMEOUT = 30
#: Seconds for a predecessor to end.
_ENDING = 10.0
#: Seconds between two looks at a descriptor that is not mounted yet.
_INTERVAL = 0.05

log = logging.getLogger("encfs.mount")


def open_mounted(mountpoint: str, options: MountOptions) -> int:
    """A new FUSE connection, mounted at `mountpoint`; nobody answers it yet. The descriptor does not block.

    Raises: MountError.
    """
    descriptor = _mount_as_root(mountpoint, options) if os.geteuid() == 0 else _mount_as_user(mountpoint, options)
    os.set_blocking(descriptor, False)
    return descriptor


def _mount_as_root(mountpoint: str, options: MountOptions) -> int:
    try:
        descriptor = _open_device()
    except OSError as error:
        raise MountError(f"{_DEVICE} cannot be opened: {error.strerror}", hint="is the kernel module loaded?") from None
    data = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0"
    if options.allow_other:
        data += ",allow_other"
    if options.default_permissions:
        data += ",default_permissions"
    flags = _MS_RDONLY | (0 if options.suid else _MS_NOSUID) | (0 if options.dev else _MS_NODEV)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(MOUNT_SOURCE.encode(), os.fsencode(mountpoint), FUSE_TYPE.encode(), flags, data.encode()) != 0:
        code = ctypes.get_errno()
        os.close(descriptor)
        raise MountError(
            f"{mountpoint} cannot be mounted: {os.strerror(code)}", hint="mounting needs CAP_SYS_ADMIN, or fusermount3"
        )
    return descriptor


def _open_device() -> int:
    """A device file of its own, which has no name any more, so that nobody else can open it; see `claim`.

    /dev/fuse itself where that cannot be made or used. Raises: OSError.
    """
    name = f"{os.path.dirname(_DEVICE)}/.encfs-{secrets.token_hex(8)}"
    try:
        os.mknod(name, stat.S_IFCHR | 0o600, DEVICE_NUMBER)
        try:
            return os.open(name, os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.unlink(name)
    except OSError as error:
        log.debug("no device file of its own: %s", error)
    return os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)


def _mount_as_user(mountpoint: str, options: MountOptions) -> int:
    """fusermount3 opens the device, mounts, and hands the descriptor over (`_FUSE_COMMFD`, as libfuse does it)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        environment = {**os.environ, "_FUSE_COMMFD": str(theirs.fileno()), "LC_ALL": "C"}
        names = ",".join(sorted(options.kernel_options()))
        try:
            done = subprocess.run(
                ["fusermount3", "-o", names, "--", mountpoint],
                pass_fds=[theirs.fileno()],
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_FUSERMOUNT_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MountError(f"{mountpoint} cannot be mounted: fusermount3: {error}", hint="install fuse3") from None
        if done.returncode != 0:
            said = " ".join(done.stderr.split()).removeprefix("fusermount3: ")
            raise MountError(f"{mountpoint} cannot be mounted: {said}", hint="does this user own the mount point?")
        # It was sent before fusermount3 ended. Without our copy of the other end, nothing is waited for.
        theirs.close()
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return int(array.array("i", content[:4])[0])
    raise MountError(f"{mountpoint} cannot be mounted: fusermount3 gave no descriptor")


def check_descriptor(descriptor: int, what: str) -> None:
    """Raises MountError unless this is an open descriptor of /dev/fuse; `what` names it."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        raise MountError(f"{what} is no open descriptor", hint="it is to be inherited by this process") from None
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != DEVICE_NUMBER:
        raise MountError(f"{what} is no descriptor of {_DEVICE}", hint=f"open {_DEVICE} and mount with it")


def read_init(descriptor: int, timeout: float) -> bytes:
    """The kernel's first request (FUSE_INIT) as it came, waiting up to `timeout` seconds for the mount to be made.

    Raises: MountError where none comes (not mounted in time; or somebody else has answered it), or something else does.
    """
    os.set_blocking(descriptor, False)
    deadline = time.monotonic() + timeout
    while True:
        try:
            request = os.read(descriptor, _ROOM)
            break
        except BlockingIOError:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise MountError("the FUSE connection has ended: it is unmounted already") from None
            if error.errno == errno.EINVAL:
                # Once begun, the kernel wants more room than this, and nothing was taken.
                raise MountError(
                    "the FUSE descriptor is in use already: another daemon has begun on it",
                    hint="hand each descriptor to one daemon",
                ) from None
            if error.errno not in {errno.EPERM, errno.EINTR}:
                raise MountError(f"the FUSE descriptor cannot be read: {error.strerror}") from None
            # EPERM: not mounted yet.
            time.sleep(_INTERVAL)
        if time.monotonic() >= deadline:
            raise MountError(
                f"the kernel did not begin on the FUSE descriptor within {timeout:g} seconds",
                hint="it was never mounted, or it was handed over twice and another daemon has begun",
            )
    _, opcode, unique, *_ = _REQUEST.unpack_from(request)
    if opcode != _OPCODE_INIT:
        # It was somebody else's to answer, and is not left to hang.
        os.write(descriptor, _REPLY.pack(_REPLY.size, -errno.EIO, unique))
        raise MountError(
            "the FUSE descriptor is in use already: its first request is not the kernel's first",
            hint="hand each descriptor to one daemon",
        )
    return request


def check_init(request: bytes) -> None:
    """Raises MountError unless this is a whole FUSE_INIT request: somebody says that the kernel sent it."""
    if len(request) >= _REQUEST.size + _INIT.size:
        size, opcode, *_ = _REQUEST.unpack_from(request)
        if size == len(request) <= _ROOM and opcode == _OPCODE_INIT:
            return
    raise MountError("the handover's init_request is no first request of the kernel")


def check_accepted(reply: bytes) -> None:
    """Raises MountError unless this answer to FUSE_INIT begins a session."""
    if len(reply) < _REPLY.size or _REPLY.unpack_from(reply)[1] != 0:
        raise MountError("libfuse refuses the kernel's first request", hint="this kernel and libfuse do not fit")


def check_connected(descriptor: int) -> None:
    """Raises MountError where a descriptor of /dev/fuse is not mounted, or is not any more."""
    poller = select.poll()
    poller.register(descriptor, 0)
    if poller.poll(0):
        raise MountError(
            "the FUSE descriptor that was handed over is mounted nowhere", hint="it never was, or is unmounted already"
        )


def connection_number(descriptor: int) -> int | None:
    """The minor device number of what a descriptor of /dev/fuse is mounted as; None where the kernel does not tell.

    Linux 6.11 and newer do (`fuse_connection` in /proc/self/fdinfo).
    """
    for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "fuse_connection" and value.strip().isdecimal():
            return int(value) & _MINOR
    return None


def claim(descriptor: int) -> None:
    """Have the kernel know that this process serves a connection, as long as it lives.

    All who have a descriptor of one connection have the same device file open, wherever they run. A lock on it
    (fcntl(2)) is one process's alone, and goes with it. That is done where the file is the connection's own
    (`open_mounted`): with /dev/fuse itself, anybody could keep it locked. The lock is gone, too, when any other
    descriptor of the file is closed here. Waits for a predecessor that is ending.

    Raises: MountError where another process serves it.
    """
    if os.fstat(descriptor).st_nlink:
        return
    deadline = time.monotonic() + _ENDING
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                raise MountError(f"the FUSE descriptor cannot be locked: {error.strerror}") from None
            if time.monotonic() >= deadline:
                raise MountError(
                    "another process serves the FUSE connection that was handed over",
                    hint="hand each descriptor to one daemon at a time",
                ) from None
            time.sleep(_INTERVAL)
        else:
            return


def can_resend(init: bytes) -> bool:
    """Whether this kernel sends requests again that a daemon took and did not answer (Linux 6.9)."""
    if len(init) < _REQUEST.size + _INIT.size:
        return False
    flags2: int = _INIT.unpack_from(init, _REQUEST.size)[4]
    return bool(flags2 & _HAS_RESEND)


def resend(descriptor: int) -> None:
    """Have the kernel send again what was taken and not answered."""
    os.write(descriptor, _REPLY.pack(_REPLY.size, _NOTIFY_RESEND, 0))


def clone(descriptor: int) -> int:
    """Another descriptor of the same connection. What is taken from it and not answered fails when it is closed.

    Raises: MountError.
    """
    # The same device file, which may have no name any more.
    copy = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(copy, _CLONE, struct.pack("=I", descriptor))
    except OSError as error:
        os.close(copy)
        raise MountError(f"the FUSE descriptor cannot be cloned: {error.strerror}") from None
    return copy


def refuse_requests(descriptor: int) -> bool:
    """Answer what is waiting with EIO, in nobody's place. False where the connection has ended."""
    while True:
        try:
            request = os.read(descriptor, (1 << 20) + _ROOM)
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno in {errno.EINTR, errno.ENOENT}:  # ENOENT: interrupted before it could be read
                continue
            return False
        _, opcode, unique, *_ = _REQUEST.unpack_from(request)
        if opcode in _UNANSWERED:
            continue
        try:
            os.write(descriptor, _REPLY.pack(_REPLY.size, -errno.EIO, unique))
        except OSError as error:
            # The asking process was killed meanwhile.
            log.debug("an answer was not wanted any more: %s", error)
