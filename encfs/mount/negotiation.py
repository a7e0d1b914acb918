"""Begin a FUSE session whose descriptor somebody else opened, or whose beginning another daemon has been through.

libfuse wants to answer FUSE_INIT before anything else. It gets the request that the kernel sent, now or long ago,
from a socket in the descriptor's place; its answer goes to the kernel the first time, and must be the same later.
Then the device takes the socket's place (dup2), and the session goes on with the kernel. Not here: who keeps the
descriptor (`keeper`), the first request itself (`fusedevice`).
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import pyfuse3
import trio

from encfs.errors import MountError, UnsupportedError
from encfs.mount.fusedevice import can_resend, check_accepted, claim, resend

#: Bytes that an answer to FUSE_INIT fits in.
_ROOM = 4096
#: Seconds for libfuse to answer: it needs neither disk nor network.
_PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Connection:
    """A FUSE connection that is handed over.

    `descriptor` is owned by whoever holds this, and negative where it comes later; `init_request` the kernel's first
    request; `init_reply` the answer that a predecessor gave to it, None where there was none. `kept`: whoever gave it
    away read the request, and sends the first answer; otherwise that is done here.
    """

    descriptor: int
    init_request: bytes
    init_reply: bytes | None = None
    kept: bool = False


class Placeholder:
    """What stands at the descriptor's place until the beginning is through."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours = ours
        #: The number that libfuse's session keeps, and closes.
        self.descriptor = theirs.detach()

    @property
    def path(self) -> str:
        """The mount point for libfuse that stands for this descriptor."""
        return f"/dev/fd/{self.descriptor}"

    def rehearse(self, connection: Connection) -> bytes:
        """Go through the beginning, with the session that pyfuse3 has been initialised with. Returns the answer.

        The connection itself is not touched, and may be another daemon's still.
        Raises: UnsupportedError where the answer is not the predecessor's; MountError.
        """
        with self._ours:
            self._ours.send(connection.init_request)
            trio.run(self._answer)
            try:
                reply = self._ours.recv(_ROOM, socket.MSG_DONTWAIT)
            except OSError:
                raise MountError("libfuse does not answer the kernel's first request") from None
        check_accepted(reply)
        if connection.init_reply not in (None, reply):
            raise UnsupportedError(
                "this version negotiates another FUSE session than the one that is to be continued",
                hint="unmount, and mount again",
            )
        return reply

    def begin(self, connection: Connection, reply: bytes) -> None:
        """Serve the connection from now on, `reply` being what `rehearse` gave. Raises: MountError."""
        os.dup2(connection.descriptor, self.descriptor, inheritable=False)
        os.close(connection.descriptor)
        claim(self.descriptor)
        if connection.init_reply is None and not connection.kept:
            try:
                os.write(self.descriptor, reply)
            except OSError as error:
                raise MountError(f"the FUSE connection has ended before it began: {error.strerror}") from None
        elif connection.init_reply is not None and can_resend(connection.init_request):
            resend(self.descriptor)

    async def _answer(self) -> None:
        with trio.move_on_after(_PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pyfuse3.main)
                await trio.lowlevel.wait_readable(self._ours)
                nursery.cancel_scope.cancel()
