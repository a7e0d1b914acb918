"""The daemon's side of its control socket (`protocol`). The socket lies in a directory that only its user can enter.

Not here: the other side (`client`), where sockets lie (`runtime`).
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Mapping

import trio

from encfs.mount.protocol import MAX_REQUEST_LINE, peer

#: Seconds for one conversation.
_PATIENCE = 5.0
#: Conversations at the same time; further ones wait.
_CONVERSATIONS = 8
#: Seconds between attempts to accept a connection.
_ACCEPT_PAUSE = 1.0

log = logging.getLogger("encfs.mount")

_Status = Callable[[], Mapping[str, object]]
_Stop = Callable[[], None]


async def serve(server: socket.socket, status: _Status, stop: _Stop) -> None:
    """Answer until cancelled. Owns `server`, which listens already."""
    limit = trio.Semaphore(_CONVERSATIONS)
    server.setblocking(False)
    with trio.socket.from_stdlib_socket(server) as listener:
        async with trio.open_nursery() as nursery:
            while True:
                await limit.acquire()
                connection = await accept(listener)
                nursery.start_soon(_converse, connection, status, stop, limit)


async def accept(listener: trio.socket.SocketType) -> trio.socket.SocketType:
    """The next connection. What keeps it from being accepted, such as a lack of descriptors, may pass, and is no reason
    for the mount to end."""
    while True:
        try:
            return (await listener.accept())[0]
        except OSError as error:
            log.warning("a connection cannot be accepted: %s", error.strerror)
            await trio.sleep(_ACCEPT_PAUSE)


async def serve_channel(channel: socket.socket, status: _Status, stop: _Stop) -> None:
    """Answer whoever is at the other end of a connection, until it ends. Owns `channel`."""
    channel.setblocking(False)
    with trio.socket.from_stdlib_socket(channel) as connection:
        try:
            while line := await _receive_line(connection):
                answer, then = _answer(line, status, stop)
                await _send(connection, answer)
                if then is not None:
                    then()
        except OSError as error:
            log.info("handover's socket: %s", error)


async def _send(connection: trio.socket.SocketType, answer: Mapping[str, object]) -> None:
    data = json.dumps(answer).encode() + b"\n"
    while data:
        data = data[await connection.send(data) :]


async def _converse(connection: trio.socket.SocketType, status: _Status, stop: _Stop, limit: trio.Semaphore) -> None:
    try:
        with connection, trio.move_on_after(_PATIENCE):
            _, user = peer(connection)
            if user not in {0, os.geteuid()}:
                return
            answer, then = _answer(await _receive_line(connection), status, stop)
            await _send(connection, answer)
            if then is not None:
                then()
    except OSError as error:
        log.info("control socket: %s", error)
    finally:
        limit.release()


async def _receive_line(connection: trio.socket.SocketType) -> bytes:
    data = b""
    while b"\n" not in data and len(data) < MAX_REQUEST_LINE:
        piece = await connection.recv(MAX_REQUEST_LINE - len(data))
        if not piece:
            break
        data += piece
    return data.partition(b"\n")[0]


def _answer(line: bytes, status: _Status, stop: _Stop) -> tuple[Mapping[str, object], _Stop | None]:
    """What to send back, and what to do after that."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {"ok": False, "error": "not a line of JSON"}, None
    operation = request.get("op") if isinstance(request, dict) else None
    if operation == "status":
        return {"ok": True, "status": status()}, None
    if operation == "stop":
        return {"ok": True}, stop
    return {"ok": False, "error": "unknown operation"}, None
