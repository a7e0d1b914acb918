"""Messages between the process that serves and the one that sets up a container, over a pair of sockets.

init → serve   "fuse", with a descriptor of /dev/fuse      serve → init   the spec
init → serve   an error, or the end of the channel: the command runs
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct

from encfs.errors import EncfsError, MountError, error_named

_LENGTH = struct.Struct("=I")
#: A spec holds an image's environment and arguments, which its config bounds.
_MAX_MESSAGE = 4 << 20


def send(channel: socket.socket, content: bytes, descriptor: int | None = None) -> None:
    """One message, with a descriptor if need be."""
    head = _LENGTH.pack(len(content))
    if descriptor is None:
        channel.sendall(head + content)
    else:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        channel.sendmsg([head], rights)
        channel.sendall(content)


def receive(channel: socket.socket) -> tuple[bytes, int | None]:
    """The next message, empty at the end of the channel; and the descriptor that came with it.

    Raises: MountError for a message that is cut short or too long.
    """
    head, ancillary, _, _ = channel.recvmsg(_LENGTH.size, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    descriptor = None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS and len(data) >= 4:
            (descriptor,) = struct.unpack("=i", data[:4])
    if not head:
        return b"", None
    (length,) = _LENGTH.unpack(head + _read(channel, _LENGTH.size - len(head)))
    if length > _MAX_MESSAGE:
        raise MountError("the container's process sent something that is too long")
    return _read(channel, length), descriptor


def _read(channel: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        piece = channel.recv(size - len(content))
        if not piece:
            raise MountError("the container's process ended in the middle of a message")
        content += piece
    return content


def error_message(error: EncfsError) -> bytes:
    return json.dumps({"error": type(error).__name__, "message": error.message, "hint": error.hint}).encode()


def parse_error(content: bytes) -> EncfsError:
    """The error that a message tells of."""
    message = json.loads(content)
    return error_named(message["error"], message["message"], message["hint"])


def close_all_but(kept: int) -> None:
    """Close every descriptor but standard input, output, error, and this one."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
