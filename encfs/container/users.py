"""Who a command runs as: `USER[:GROUP]` looked up in the image's own /etc/passwd and /etc/group (passwd(5), group(5)).

As container runtimes do it: a name has to be there; a number need not, and has then the group 0 and the home `/`.
Further groups are those that list the user, but none where a group is named. Not here: becoming that user (`init`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from encfs.errors import NotFoundError, UsageError

_MAX_ID = (1 << 32) - 2
#: Further groups at most (NGROUPS_MAX).
_MAX_GROUPS = 65536


@dataclass(frozen=True, slots=True)
class Account:
    """Numbers and home directory."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def find_account(text: str, passwd: str, group: str) -> Account:
    """`text` as in an image's config, empty for root; `passwd` and `group` the contents of the files.

    Raises: NotFoundError for a name that is not there; UsageError for a number out of range.
    """
    user, _, wanted_group = text.partition(":")
    name, uid, gid, home = _find_user(user or "0", passwd)
    if wanted_group:
        return Account(uid, _find_group(wanted_group, group), (), home)
    groups = [number for _, number, members in _groups(group) if name and name in members]
    return Account(uid, gid, tuple(dict.fromkeys(groups))[:_MAX_GROUPS], home)


def _find_user(user: str, passwd: str) -> tuple[str, int, int, str]:
    entries = list(_users(passwd))
    for name, uid, gid, home in entries:
        if name == user:
            return name, uid, gid, home
    if not user.isdecimal():
        raise NotFoundError(f"the image knows no user {user}", hint="name another one with --user, or its number")
    number = _checked(user)
    for name, uid, gid, home in entries:
        if uid == number:
            return name, uid, gid, home
    return "", number, 0, "/"


def _find_group(wanted: str, group: str) -> int:
    for name, number, _ in _groups(group):
        if name == wanted:
            return number
    if not wanted.isdecimal():
        raise NotFoundError(f"the image knows no group {wanted}", hint="name another one with --user USER:GROUP")
    return _checked(wanted)


def _checked(text: str) -> int:
    number = int(text) if len(text) <= 10 else _MAX_ID + 1
    if number > _MAX_ID:
        raise UsageError(f"{text[:20]} is no user or group: the largest is {_MAX_ID}")
    return number


def _users(passwd: str) -> Iterator[tuple[str, int, int, str]]:
    """Name, uid, gid, home; lines that are none are passed over."""
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) >= 6 and fields[0] and fields[2].isdecimal() and fields[3].isdecimal():
            uid, gid = int(fields[2][:11]), int(fields[3][:11])
            if uid <= _MAX_ID and gid <= _MAX_ID:
                yield fields[0], uid, gid, fields[5] or "/"


def _groups(group: str) -> Iterator[tuple[str, int, frozenset[str]]]:
    for line in group.splitlines():
        fields = line.split(":")
        if len(fields) >= 4 and fields[0] and fields[2].isdecimal() and int(fields[2][:11]) <= _MAX_ID:
            yield fields[0], int(fields[2][:11]), frozenset(fields[3].split(","))
