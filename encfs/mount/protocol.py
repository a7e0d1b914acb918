"""What both sides of a control socket agree on: bounds, and who the other side is.

One JSON object a line each way:

    {"op": "status"}  →  {"ok": true, "status": {…}}, the fields of `MountStatus`
    {"op": "stop"}    →  {"ok": true}, and the mount ends, whoever uses it
    anything else     →  {"ok": false, "error": "…"}
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

#: Bytes of a request line, and of an answer line.
MAX_REQUEST_LINE = 4096
MAX_ANSWER = 1 << 20
#: Characters that are shown of what another process says.
_MAX_SAID = 500
#: struct ucred of unix(7): pid, uid, gid.
_CREDENTIALS = struct.Struct("=iII")


class _HasOptions(Protocol):
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...


def one_line(text: str) -> str:
    """What another process says of itself, fit for a log: printable, on one line, cut short."""
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_SAID])


def peer(connection: _HasOptions) -> tuple[int, int]:
    """(pid, uid) of the other side of a unix socket; pid 0 where it is not seen from this pid namespace."""
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid
