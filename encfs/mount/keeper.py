"""Keep a FUSE connection while daemons come and go: whoever serves it gets it handed over, one at a time.

For processes that hold no key: the supervisor of a mount, the node plugin. Not here: when a daemon is started
(`supervisor`), the daemon's side and the messages (`handover`).
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from encfs.encoding import b64_decode, b64_encode, parse_digest
from encfs.errors import FormatError, MountError
from encfs.mount.fusedevice import (
    can_resend,
    check_accepted,
    check_connected,
    check_descriptor,
    check_init,
    clone,
    read_init,
    refuse_requests,
)
from encfs.mount.handover import octets

#: Seconds for the kernel to begin, once something is mounted.
_INIT_TIMEOUT = 10.0


@dataclass(slots=True)
class Keeper:
    """One FUSE connection. `descriptor` is owned; the digests are of what is served, once a daemon has begun to."""

    descriptor: int
    mountpoint: str
    init_request: bytes
    attributes: Mapping[str, str] = field(default_factory=dict)
    init_reply: bytes | None = None
    content_digest: str = ""
    manifest_digest: str = ""
    restarts: int = 0
    reason: str = ""
    #: To answer in nobody's place. A daemon shares `descriptor`, and could make that one block; not this one.
    _own: int = -1

    @classmethod
    def begin(cls, descriptor: int, mountpoint: str, attributes: Mapping[str, str] | None = None) -> Keeper:
        """For a descriptor that was just mounted, and is owned from now on. Raises: MountError."""
        try:
            return cls(descriptor, mountpoint, read_init(descriptor, _INIT_TIMEOUT), attributes or {})
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def take_back(
        cls, message: Mapping[str, object], descriptor: int, mountpoint: str, attributes: Mapping[str, str]
    ) -> Keeper:
        """From the daemon that an earlier keeper handed the connection to. `descriptor` is owned from now on.

        Raises: MountError for what no daemon of ours brings back.
        """
        try:
            check_descriptor(descriptor, "what was brought back")
            check_connected(descriptor)
            request, reply = octets(message, "init_request") or b"", octets(message, "init_reply") or b""
            check_init(request)
            check_accepted(reply)
            if not can_resend(request):
                # Closed with the last daemon that has it: see `hand_over`.
                shared, descriptor = descriptor, clone(descriptor)
                os.close(shared)
            keeper = cls(descriptor, mountpoint, request, attributes, reply)
            keeper._note_served(message)
        except BaseException:
            os.close(descriptor)
            raise
        return keeper

    def hand_over(self, channel: socket.socket, *, relayed: bool = False, bring_back: bool = False) -> None:
        """Give the connection to the daemon at the other end. Raises: MountError, OSError."""
        self._give(channel, self._document(relayed=relayed, bring_back=bring_back))

    def rehearse(self, channel: socket.socket, *, relayed: bool = False) -> None:
        """Let the daemon at the other end prepare to follow the one that serves; `hand_over` is next.

        Raises: OSError.
        """
        document = {**self._document(relayed=relayed), "rehearse": True}
        channel.sendall(json.dumps(document).encode() + b"\n")

    def _document(self, *, relayed: bool, bring_back: bool = False) -> dict[str, object]:
        return {
            "encfs": 1,
            "mountpoint": self.mountpoint,
            "init_request": b64_encode(self.init_request),
            "init_reply": None if self.init_reply is None else b64_encode(self.init_reply),
            "content_digest": self.content_digest,
            "manifest_digest": self.manifest_digest,
            "attributes": dict(self.attributes),
            "relayed": relayed,
            "bring_back": bring_back,
            "supervisor": os.getpid() if relayed else 0,
            "restarts": self.restarts,
            "reason": self.reason,
        }

    def _give(self, channel: socket.socket, document: Mapping[str, object]) -> None:
        # Where the kernel cannot send requests again, those of a daemon that dies are to fail, not to wait for ever:
        # they do when its own descriptor is closed.
        own = can_resend(self.init_request)
        descriptor = self.descriptor if own else clone(self.descriptor)
        try:
            channel.sendmsg(
                [json.dumps(document).encode() + b"\n"],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))],
            )
        finally:
            if not own:
                os.close(descriptor)

    def note(self, event: Mapping[str, object]) -> None:
        """Take in what a daemon tells, and pass its first answer on to the kernel.

        Raises: MountError for what no daemon of ours tells; OSError where the kernel does not take the answer.
        """
        match event:
            case {"event": "negotiated", "init_reply": str(text)} if self.init_reply is None:
                try:
                    reply = b64_decode(text, "the daemon's answer to the kernel")
                except FormatError as error:
                    raise MountError(error.message) from None
                check_accepted(reply)
                self.init_reply = reply
                # From now on requests are answered, and the kernel keeps what it gets: a successor must serve the same.
                self._note_served(event)
                # From the descriptor that the request was read from: the kernel looks for it there.
                os.write(self.descriptor, reply)
            case {"event": "negotiated"}:
                self._note_served(event)
            case {"event": "ready", "status": dict(status)}:
                # A daemon of an earlier version says it here only.
                self._note_served(status)

    def _note_served(self, told: Mapping[str, object]) -> None:
        """Take in which content is served, once. Raises: MountError."""
        content, manifest = told.get("content_digest") or "", told.get("manifest_digest") or ""
        if self.content_digest or not content:
            return
        try:
            parse_digest(content)
            if manifest:
                parse_digest(manifest)
        except FormatError:
            raise MountError("the daemon says to serve what is no digest") from None
        self.content_digest, self.manifest_digest = str(content), str(manifest)

    def refuse_requests(self) -> bool:
        """Answer what is waiting with EIO, in nobody's place. False where the connection has ended."""
        if self._own < 0:
            try:
                self._own = clone(self.descriptor)
            except MountError:
                return False
        return refuse_requests(self._own)

    def close(self) -> None:
        """End the connection: every request that waits fails."""
        for descriptor in {self.descriptor, self._own} - {-1}:
            os.close(descriptor)
        self.descriptor = self._own = -1
