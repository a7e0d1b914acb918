"""List mounts and end them, from any process: control sockets, /proc/self/mountinfo, umount.

Not here: the daemon (`daemon`). Neither pyfuse3 nor trio is needed.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from encfs.errors import MountError, NotMountedError
from encfs.mount.holders import find_holders
from encfs.mount.mountpoint import (
    BusyError,
    MountInfo,
    absolute,
    current_mounts,
    is_dead,
    top_mount,
    unmount,
)
from encfs.mount.options import MountStatus
from encfs.mount.protocol import MAX_ANSWER, peer
from encfs.mount.runtime import (
    belongs_to,
    existing_runtime_directory,
    has_leftovers,
    remove_leftovers,
    short_path,
    sockets,
)

#: Seconds to wait for one answer of a daemon.
_PATIENCE = 5.0
#: Seconds between two looks at something that gives no notice.
_INTERVAL = 0.02
#: Seconds for which a mount that nobody seems to use may be in use: who looks at it (df, another's status) does so.
_MOMENT = 2.0


class _NoDaemonError(Exception):
    """Nobody listens at a control socket."""


class _SilentError(Exception):
    """Somebody listens at a control socket, and gives no proper answer in time."""


@dataclass(frozen=True, slots=True)
class _Daemon:
    """Somebody who listens at a control socket. `status` None: no proper answer. `pid` 0: in another pid namespace."""

    path: Path
    pid: int
    status: MountStatus | None

    def serves(self, mount: MountInfo) -> bool:
        if self.status is None:
            return belongs_to(self.path, mount.mountpoint)
        return self.status.device == mount.device


def mounts() -> list[MountStatus]:
    """Every mount known to this user's runtime directory or seen in this mount namespace, ordered by mount point.

    Files of daemons that are gone are removed from the runtime directory, except of those whose dead mount is still
    there. A silent daemon whose mount is not seen has no mount point.
    Raises: StorageError where the runtime directory is unfit.
    """
    daemons = _find_daemons()
    found, seen = [], set()
    for mount in _our_mounts():
        daemon = next((daemon for daemon in daemons if daemon.serves(mount)), None)
        if daemon is None:
            dead = _is_abandoned(mount.mountpoint, daemons)
            found.append(MountStatus(mount.mountpoint, "dead" if dead else "foreign", mount.device))
        elif daemon.status is None:
            found.append(MountStatus(mount.mountpoint, "silent", mount.device, daemon.pid))
        else:
            found.append(replace(daemon.status, mountpoint=mount.mountpoint))
        if daemon is not None:
            seen.add(daemon.path)
    for daemon in daemons:
        if daemon.path not in seen:
            status = daemon.status
            found.append(replace(status, state="detached") if status else MountStatus("", "silent", pid=daemon.pid))
    return sorted(found, key=lambda status: status.mountpoint)


def umount(
    mountpoint: str | os.PathLike[str], *, timeout: float = 10.0, lazy: bool = False, force: bool = False
) -> None:
    """Unmount, and return once the daemon has ended and nothing is left behind; `timeout` in seconds.

    `lazy` takes the mount out of the tree at once; its daemon goes on until the last user is gone, and is not waited
    for. `force` has the daemon end now, and open files fail; where the daemon is silent, the mount is detached.
    Raises: NotMountedError; MountError where it is in use (naming by whom) or the daemon does not end in time.
    """
    place = absolute(mountpoint)
    mount = top_mount(place)
    if mount is None or not mount.is_ours:
        raise NotMountedError(f"nothing of ours is mounted at {place}", hint="encfs status lists the mounts")
    daemons = _find_daemons()
    daemon = next((daemon for daemon in daemons if daemon.serves(mount)), None)
    deadline = time.monotonic() + timeout
    if daemon is None:
        # Its daemon is gone, or belongs to somebody whose sockets are not seen here.
        _unmount_politely(place, lazy=lazy or _is_abandoned(place, daemons))
        clear_leftovers(place)
        return
    watch = _watch(daemon.pid)
    try:
        if force:
            _force(mount, daemon, deadline)
        else:
            _unmount_politely(place, lazy=lazy)
        # The same mount may be bound to other places: its daemon serves them on.
        if lazy or any(other.device == mount.device for other in _our_mounts()):
            return
        if not _has_ended(daemon, watch, deadline):
            raise MountError(
                f"{place} is unmounted, but its daemon (pid {daemon.pid}) has not ended within {timeout:g} seconds",
                hint="look into its log, or end it with kill",
            )
    finally:
        if watch is not None:
            os.close(watch)


def _our_mounts() -> list[MountInfo]:
    """The mounts of ours that are seen, the one on top where several are stacked."""
    top = {mount.mountpoint: mount for mount in current_mounts()}
    return [mount for mount in top.values() if mount.is_ours]


def is_abandoned(mountpoint: str) -> bool:
    """Whether the daemon of the mount there is gone. Raises: as `mounts`."""
    return _is_abandoned(mountpoint, _find_daemons())


def _is_abandoned(mountpoint: str, daemons: list[_Daemon]) -> bool:
    """The mount answers that it is; or, where the kernel answers without asking, the daemon left its files behind."""
    if is_dead(mountpoint):
        return True
    directory = existing_runtime_directory()
    return directory is not None and has_leftovers(directory, mountpoint, [daemon.path for daemon in daemons])


def _unmount_politely(mountpoint: str, *, lazy: bool) -> None:
    holders: list[str] = []
    for seconds in (0.0, _MOMENT):
        if _unmounts_within(seconds, mountpoint, lazy=lazy):
            return
        if holders := find_holders(mountpoint):
            break
    by = f" by {', '.join(holders)}" if holders else ""
    raise MountError(
        f"{mountpoint} is in use{by}",
        hint="end what uses it, or use --lazy to end it with its last user, or --force to end it now",
    )


def _unmounts_within(seconds: float, mountpoint: str, *, lazy: bool) -> bool:
    """Whether that succeeds, tried once at least; False as long as the mount is in use."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            unmount(mountpoint, lazy=lazy)
        except BusyError:
            if time.monotonic() >= deadline:
                return False
        else:
            return True
        time.sleep(_INTERVAL)


def _force(mount: MountInfo, daemon: _Daemon, deadline: float) -> None:
    """Have the daemon unmount and end; where it does not take the order, detach the mount."""
    try:
        _ask(daemon.path, "stop")
    except (_NoDaemonError, _SilentError):
        unmount(mount.mountpoint, lazy=True)
        return
    while _is_on_top(mount) and time.monotonic() < deadline:
        time.sleep(_INTERVAL)


def _is_on_top(mount: MountInfo) -> bool:
    top = top_mount(mount.mountpoint)
    return top is not None and top.device == mount.device


def _watch(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where there is no such process to be seen."""
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None


def _has_ended(daemon: _Daemon, watch: int | None, deadline: float) -> bool:
    """Whether the daemon has ended by `deadline` (seconds, monotonic)."""
    if watch is not None:
        poller = select.poll()
        poller.register(watch, select.POLLIN)
        return bool(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
    while daemon.path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_INTERVAL)
    return True


# Control sockets


def _find_daemons() -> list[_Daemon]:
    """Everybody who listens in the runtime directory.

    Sockets without a listener are removed, but where the mount is still there: then they are how one can tell that.
    """
    directory = existing_runtime_directory()
    places = [mount.mountpoint for mount in _our_mounts()]
    found = []
    for path in sockets(directory) if directory else ():
        pid = 0
        try:
            with _connect(path) as connection:
                pid, _ = peer(connection)
            found.append(_Daemon(path, pid, _parse_status(_ask(path, "status"))))
        except _NoDaemonError:
            if not any(belongs_to(path, place) for place in places):
                path.unlink(missing_ok=True)
        except _SilentError:
            found.append(_Daemon(path, pid, None))
    return found


def clear_leftovers(mountpoint: str) -> None:
    """Remove what killed daemons of this mount point left in the runtime directory."""
    directory = existing_runtime_directory()
    if directory is not None:
        remove_leftovers(directory, mountpoint, [daemon.path for daemon in _find_daemons()])


def _parse_status(answer: Mapping[str, object]) -> MountStatus:
    status = MountStatus.from_json(answer.get("status"))
    if status is None:
        raise _SilentError
    return status


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(_PATIENCE)
    try:
        with short_path(path) as address:
            connection.connect(address)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise _NoDaemonError from None
    except OSError:
        connection.close()
        raise _SilentError from None
    return connection


def _ask(path: Path, operation: str) -> Mapping[str, object]:
    data = b""
    deadline = time.monotonic() + _PATIENCE
    with _connect(path) as connection:
        try:
            connection.sendall(json.dumps({"op": operation}).encode() + b"\n")
            while not data.endswith(b"\n") and len(data) < MAX_ANSWER and time.monotonic() < deadline:
                piece = connection.recv(64 << 10)
                if not piece:
                    break
                data += piece
            answer = json.loads(data)
        except (OSError, ValueError, RecursionError):
            raise _SilentError from None
    if not isinstance(answer, dict) or answer.get("ok") is not True:
        raise _SilentError
    return answer
