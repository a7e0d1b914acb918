"""Bring a FUSE connection back to a giver that was restarted, and has lost its descriptor meanwhile.

The giver is found at the socket where the connection was handed over. Until it is there again, which may be never, the
mount is served without it. Not here: what the giver does with it (`keeper`), the messages (`handover`).
"""

from __future__ import annotations

import array
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from encfs.errors import MountError
from encfs.mount.handover import check_giver
from encfs.mount.runtime import short_path

#: Seconds between two looks for the giver.
_INTERVAL = 1.0
#: Seconds after a conversation that did not last, doubled up to the last, and how long one lasts that did.
_LONGEST_PAUSE = 30.0
_LASTING = 10.0

log = logging.getLogger("encfs.mount")


@dataclass(frozen=True, slots=True)
class Returning:
    """What to bring back, and where: `home` is a socket's path, `members` are of the message.

    `descriptor` stays this process's.
    """

    home: str
    descriptor: int
    members: Mapping[str, object]


async def bring_back(returning: Returning, converse: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Whenever the giver is there and does not know of the connection. `converse` owns the channel to it, until it
    ends. Until cancelled."""
    pause = _INTERVAL
    while True:
        await trio.sleep(pause)
        channel = _give(returning)
        if channel is None:
            continue
        log.info("the connection is brought back to %s", returning.home)
        began = trio.current_time()
        await converse(channel)
        lasted = trio.current_time() - began > _LASTING
        pause = _INTERVAL if lasted else min(pause * 2, _LONGEST_PAUSE)
        log.warning("whoever the connection was brought back to is gone")


def _give(returning: Returning) -> socket.socket | None:
    """A channel to the giver, which has got everything; None where there is nobody."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        with short_path(Path(returning.home)) as address:
            channel.connect(address)
        check_giver(channel)
        line = json.dumps({"event": "returned", **returning.members}).encode() + b"\n"
        rights = array.array("i", [returning.descriptor])
        # A new connection's buffer takes all of it.
        channel.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    except (OSError, MountError) as error:
        log.debug("nobody to bring the connection back to at %s: %s", returning.home, error)
        channel.close()
        return None
    return channel
