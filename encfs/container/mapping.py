"""The users and groups of a container without root (user_namespaces(7)): this user alone, who is root in there, or
besides it the ranges that the machine lets it have (subuid(5), newuidmap(1)), as podman maps them.

Whoever makes the namespace cannot run newuidmap itself: a helper stays outside of it. Not here: the namespace (`init`).
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass

from encfs.errors import MountError

_PROGRAM_DIRECTORIES = ("/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin")
_MAX_FILE = 1 << 20
#: Extents of a map that the kernel takes, less the one for this user.
_MAX_RANGES = 339
_MAX_ID = (1 << 32) - 2

#: (first inside, first outside, how many)
_Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Mapped:
    """Users and groups that there are in the namespace: the numbers from 0 on. `reason`: why only one, if so."""

    users: int
    groups: int
    reason: str = ""


class Mapper:
    """To be made before the namespace. Its helper ends with `map_users`, or with this process."""

    def __init__(self) -> None:
        """Raises: OSError."""
        self._user, self._group = os.geteuid(), os.getegid()
        names = _own_names(self._user)
        self._users = _ranges("/etc/subuid", names, self._user)
        self._groups = _ranges("/etc/subgid", names, self._group)
        programs = [_program("newuidmap"), _program("newgidmap")]
        self._reason = ""
        self._orders = -1
        if len(self._users) == 1 or len(self._groups) == 1:
            self._reason = "this user has no range in /etc/subuid and /etc/subgid"
        elif None in programs:
            self._reason = "newuidmap and newgidmap are not installed (Debian: uidmap)"
        else:
            self._start_helper([str(program) for program in programs])

    def _start_helper(self, programs: Sequence[str]) -> None:
        target = str(os.getpid())
        orders, self._orders = os.pipe2(os.O_CLOEXEC)
        self._helper = os.fork()
        if self._helper:
            os.close(orders)
            return
        code = 1
        try:
            os.close(self._orders)
            if os.read(orders, 1):
                maps = (self._users, self._groups)
                code = int(not all(_run(one, target, ranges) for one, ranges in zip(programs, maps, strict=True)))
        finally:
            os._exit(code)

    def map_users(self) -> Mapped:
        """Within the new namespace: map what can be mapped. Raises: OSError."""
        if self._orders >= 0:
            os.write(self._orders, b"x")
            os.close(self._orders)
            _, status = os.waitpid(self._helper, 0)
            if os.waitstatus_to_exitcode(status) == 0:
                return Mapped(_count(self._users), _count(self._groups))
            self._reason = "newuidmap or newgidmap refuses the ranges of /etc/subuid and /etc/subgid"
        # The one user that may be mapped without help is this one.
        alone = {"setgroups": "deny", "uid_map": f"0 {self._user} 1", "gid_map": f"0 {self._group} 1"}
        for name, text in alone.items():
            if name == "uid_map" and _is_mapped(name):
                continue
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return Mapped(1, 1, self._reason)


def check_user(mapped: Mapped, user: int, group: int) -> None:
    """Raises: MountError where a user or group is not there."""
    if user < mapped.users and group < mapped.groups:
        return
    if mapped.reason:
        raise MountError(
            f"without root the command cannot run as user {user}, group {group}: {mapped.reason}",
            hint="have ranges added (usermod --add-subuids, --add-subgids), run encfs as root, or give --user 0",
        )
    raise MountError(
        f"the ranges of /etc/subuid and /etc/subgid end before user {user}, group {group}",
        hint=f"users up to {mapped.users - 1} and groups up to {mapped.groups - 1} are there; have more added",
    )


def _own_names(user: int) -> tuple[str, ...]:
    """What lines of subuid(5) may begin with, for this user."""
    try:
        return (pwd.getpwuid(user).pw_name, str(user))
    except KeyError:
        return (str(user),)


def _ranges(path: str, names: Sequence[str], own: int) -> list[_Range]:
    """This user, or group, and behind it the ranges that a file gives to the first of `names`, then the next."""
    found: list[_Range] = [(0, own, 1)]
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(_MAX_FILE).splitlines()
    except OSError:
        return found
    for line in lines:
        fields = line.split(":")
        if len(fields) != 3 or fields[0] not in names or not all(field.isdecimal() for field in fields[1:]):
            continue
        start, count = int(fields[1][:11]), int(fields[2][:11])
        if count and start + count - 1 <= _MAX_ID and _count(found) + count <= _MAX_ID and len(found) <= _MAX_RANGES:
            found.append((_count(found), start, count))
    return found


def _count(ranges: Sequence[_Range]) -> int:
    first, _, count = ranges[-1]
    return first + count


def _program(name: str) -> str | None:
    paths = (f"{directory}/{name}" for directory in _PROGRAM_DIRECTORIES)
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def _run(program: str, target: str, ranges: Sequence[_Range]) -> bool:
    """Run newuidmap or newgidmap; what it says has no place on the command's standard error."""
    words = [program, target, *(str(number) for one in ranges for number in one)]
    quiet = [(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in (0, 1, 2)]
    pid = os.posix_spawn(program, words, {}, file_actions=quiet)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _is_mapped(name: str) -> bool:
    with open(f"/proc/self/{name}") as file:
        return bool(file.read(1))
