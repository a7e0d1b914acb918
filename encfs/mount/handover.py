"""A FUSE descriptor handed from who mounts to who reads and decrypts: the daemon's side, and the messages.

The two talk over a unix socket, one JSON object a line; the descriptor comes with the first one (SCM_RIGHTS):

    giver  → {"encfs": 1, …: what `Handover` has}, or {} with a descriptor that nobody has read from yet
           → {"error": "…"}: there is nothing to hand over
           → the same with "rehearse" and no descriptor, while a predecessor serves still
    daemon → {"event": "prepared"}: it can serve this, and waits
    giver  → the first message again, with the descriptor: the predecessor has ended
    daemon → {"event": "negotiated", "init_reply": base64, "content_digest", "manifest_digest": what is served now}
           → {"event": "ready", "status": {…}}
           → {"event": "failed", "error": type, "message": "…", "hint": "…"}
    giver  → requests of `protocol`, answered like those at a control socket

A giver that is restarted has lost its descriptor. Where it asked for that ("bring_back"), the daemon comes to its
socket again, and gives what it got, with the descriptor (`returning`):

    daemon → {"event": "returned", "init_request", "init_reply": base64, "content_digest", "manifest_digest"}

Nothing that comes this way is trusted with anything but the mount itself. Not here: who gives (`keeper`), the FUSE
session (`negotiation`).
"""

from __future__ import annotations

import array
import json
import os
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from encfs.encoding import b64_decode, parse_digest
from encfs.errors import EncfsError, FormatError, MountError, UsageError
from encfs.image.artifact import Served
from encfs.mount.fusedevice import check_connected, check_descriptor, check_init, read_init
from encfs.mount.negotiation import Connection
from encfs.mount.protocol import one_line, peer
from encfs.mount.runtime import short_path
from encfs.strictjson import MAX_INTEGER, show_name

#: Seconds for a descriptor to be handed over, and for the kernel to begin on it.
HANDOVER_TIMEOUT = 30.0
#: Seconds from being prepared until the predecessor has ended.
TAKEOVER_TIMEOUT = 60.0
#: Bytes of one message.
MAX_MESSAGE = 64 << 10
_MAX_ATTRIBUTES = 64
_INTERVAL = 0.05
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Handover:
    """What was handed over. `channel` is the socket it came by, owned by whoever holds this; None: a bare descriptor.

    `mountpoint` is where the giver says it is mounted; `content_digest` what a predecessor served, which must be served
    on, and `manifest_digest` the manifest that it was opened by; `attributes` what a volume was asked for with;
    `relayed`: the giver answers for the daemon at a control socket; `home` is the socket to bring the connection back
    to when the giver has been restarted, empty where it does not ask for that;
    `rehearse`: the descriptor comes later (`await_descriptor`);
    `restarts` and `reason`: how many daemons there were before, and what became of the last.
    """

    connection: Connection
    mountpoint: str = ""
    content_digest: str = ""
    manifest_digest: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    relayed: bool = False
    home: str = ""
    rehearse: bool = False
    supervisor: int = 0
    restarts: int = 0
    reason: str = ""
    channel: socket.socket | None = None

    @property
    def served(self) -> Served | None:
        """What to go on with, where a predecessor has served."""
        if not self.content_digest or not self.manifest_digest:
            return None
        return Served(self.content_digest, self.manifest_digest)

    def tell(self, event: str, **more: object) -> None:
        """Tell the giver, if there is one and it still listens."""
        if self.channel is not None:
            with suppress(OSError):
                self.channel.sendall(json.dumps({"event": event, **more}).encode() + b"\n")

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """An error in here is the giver's to know, too."""
        try:
            yield
        except EncfsError as error:
            self.tell("failed", error=type(error).__name__, message=error.message, hint=error.hint)
            raise

    def await_descriptor(self, timeout: float = TAKEOVER_TIMEOUT) -> Handover:
        """The same with the descriptor, once the predecessor has ended, within `timeout` seconds.

        Raises: MountError.
        """
        if self.channel is None:
            raise MountError("the descriptor is to come later, and there is nowhere that it could come from")
        self.tell("prepared")
        descriptors: list[int] = []
        try:
            document = receive_message(self.channel, time.monotonic() + timeout, descriptors)
            _check_descriptors(document, descriptors)
            handed = parse(document, descriptors[0], 1.0, self.channel)
            _check_rehearsed(self.connection, handed.connection)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        self.channel.settimeout(None)
        return handed

    def check_content(self, content_digest: str) -> None:
        """Raises MountError where a predecessor served something else: open files would change under their readers."""
        if self.content_digest not in {"", content_digest}:
            raise MountError(
                f"the reference names {content_digest} now, and the mount has served {self.content_digest}",
                hint="unmount, and mount again, to change over to it",
            )


def _check_rehearsed(before: Connection, after: Connection) -> None:
    if replace(after, descriptor=before.descriptor) != before:
        raise MountError("the connection that was handed over is not the one that was rehearsed")


def receive(where: str, timeout: float = HANDOVER_TIMEOUT) -> Handover:
    """What `--fuse-fd WHERE` stands for: a descriptor's number, of /dev/fuse or of a unix socket, or `unix:SOCKET`.

    Waits at most `timeout` seconds for each of: the giver, the descriptor, the kernel. Raises: UsageError, MountError.
    """
    deadline = time.monotonic() + timeout
    if where.startswith(_UNIX) and len(where) > len(_UNIX):
        path = where.removeprefix(_UNIX)
        return _receive_from(_connect(path, deadline), deadline, path)
    if not where.isascii() or not where.isdecimal() or len(where) > 7:
        raise UsageError(f"--fuse-fd {where!r} is neither a descriptor nor a socket", hint="write N or unix:SOCKET")
    number = int(where)
    if _is_socket(number):
        return _receive_from(socket.socket(fileno=number), deadline)
    check_descriptor(number, f"descriptor {number}")
    os.set_inheritable(number, False)
    return Handover(Connection(number, read_init(number, timeout)))


def _is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False  # not open, which is said later


def _connect(path: str, deadline: float) -> socket.socket:
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            with short_path(Path(path)) as address:
                connection.connect(address)
        except OSError as error:
            connection.close()
            if time.monotonic() >= deadline:
                raise MountError(
                    f"nobody hands a FUSE descriptor over at {path}: {error.strerror or error}",
                    hint="is the node component running, and the volume in this pod?",
                ) from None
            time.sleep(_INTERVAL)
        else:
            return connection


def _receive_from(channel: socket.socket, deadline: float, path: str = "") -> Handover:
    descriptors: list[int] = []
    try:
        check_giver(channel)
        document = receive_message(channel, deadline, descriptors)
        rehearse = document.get("rehearse") is True
        _check_descriptors(document, descriptors, 0 if rehearse else 1)
        handover = parse(
            document, -1 if rehearse else descriptors[0], max(1.0, deadline - time.monotonic()), channel, path
        )
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        channel.close()
        raise
    channel.settimeout(None)
    return handover


def check_giver(channel: socket.socket) -> None:
    """Raises MountError unless root or this process's own user is at the other end."""
    try:
        _, user = peer(channel)
    except OSError:
        raise MountError("the handover's socket does not tell who is at the other end") from None
    if user not in {0, os.geteuid()}:
        raise MountError(
            f"user {user} is at the other end of the handover's socket",
            hint="only root and this daemon's own user may hand a descriptor over",
        )


def _check_descriptors(document: Mapping[str, object], descriptors: list[int], expected: int = 1) -> None:
    if "error" in document:
        raise MountError(f"no descriptor is handed over: {one_line(str(document['error']))}")
    if len(descriptors) != expected:
        raise MountError(f"{len(descriptors)} descriptors were handed over, where {expected} should be")
    for descriptor in descriptors:
        check_descriptor(descriptor, "what was handed over")


def receive_message(channel: socket.socket, deadline: float, descriptors: list[int]) -> Mapping[str, object]:
    """One line before `deadline` (monotonic seconds), and the descriptors that came with it, which are the caller's to
    close in any case. Raises: MountError."""
    data = b""
    try:
        while b"\n" not in data and len(data) < MAX_MESSAGE:
            left = deadline - time.monotonic()
            if left <= 0 and data:
                raise TimeoutError  # noqa: TRY301 - as the socket does where nothing comes
            channel.settimeout(max(0.01, left))
            piece, ancillary, _, _ = channel.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC)
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.extend(array.array("i", content[: len(content) // 4 * 4]))
            if not piece:
                raise MountError("the node component ended the handover before it gave a descriptor")
            data += piece
        document = json.loads(data)
    except TimeoutError:
        raise MountError("no descriptor was handed over in time") from None
    except (OSError, ValueError, RecursionError):
        raise MountError("the handover is no message of this protocol") from None
    if not isinstance(document, dict):
        raise MountError("the handover is no message of this protocol")
    return document


def parse(
    document: Mapping[str, object], descriptor: int, timeout: float, channel: socket.socket | None, path: str = ""
) -> Handover:
    """A giver's first message, which came by the socket at `path`. Raises: MountError."""
    mountpoint, reason = _text(document, "mountpoint"), _text(document, "reason")
    attributes = document.get("attributes", {})
    if (
        not isinstance(attributes, dict)
        or len(attributes) > _MAX_ATTRIBUTES
        or not all(isinstance(value, str) for value in attributes.values())
    ):
        raise MountError("the handover's attributes are of a wrong kind")
    # It goes to logs and to system calls.
    if mountpoint and (not mountpoint.startswith("/") or not mountpoint.isprintable()):
        raise MountError(f"the handover's mountpoint {show_name(mountpoint)} is no absolute path")
    request, reply = octets(document, "init_request"), octets(document, "init_reply")
    if request:
        check_init(request)
        if descriptor >= 0:
            check_connected(descriptor)
    elif descriptor < 0:
        raise MountError("the handover's first request is missing")
    return Handover(
        Connection(
            descriptor, request or read_init(descriptor, timeout), reply if request else None, kept=bool(request)
        ),
        mountpoint=mountpoint,
        content_digest=_digest(document, "content_digest"),
        manifest_digest=_digest(document, "manifest_digest"),
        attributes=attributes,
        relayed=document.get("relayed") is True,
        home=path if document.get("bring_back") is True else "",
        rehearse=descriptor < 0,
        supervisor=_number(document, "supervisor"),
        restarts=_number(document, "restarts"),
        reason=one_line(reason),
        channel=channel,
    )


def _text(document: Mapping[str, object], name: str) -> str:
    value = document.get(name, "")
    if not isinstance(value, str):
        raise MountError(f"the handover's {name} is of a wrong kind")
    return value


def _number(document: Mapping[str, object], name: str) -> int:
    value = document.get(name, 0)
    if not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
        raise MountError(f"the handover's {name} is of a wrong kind")
    return value


def _digest(document: Mapping[str, object], name: str) -> str:
    value = _text(document, name)
    try:
        if value:
            parse_digest(value)
    except FormatError:
        raise MountError(f"the handover's {name} is no digest") from None
    return value


def octets(document: Mapping[str, object], name: str) -> bytes | None:
    """A member in base64; None where there is none. Raises: MountError."""
    value = document.get(name)
    try:
        return None if value is None else b64_decode(value, f"the handover's {name}")
    except FormatError as error:
        raise MountError(error.message) from None
