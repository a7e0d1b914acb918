"""One volume of the node plugin: its FUSE connection, and the socket in the pod where the daemon fetches it.

The volume is mounted before any container of the pod runs. From then on requests wait for a daemon for `PATIENCE`
seconds, and fail with EIO until one comes; daemons may come and go, one at a time. Not here: gRPC (`node`).
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from encfs.errors import EncfsError, MountError
from encfs.mount.fusedevice import open_mounted, refuse_requests
from encfs.mount.keeper import Keeper
from encfs.mount.mountpoint import top_mount, unmount, unmount_for_all
from encfs.mount.options import MAX_REQUEST, MountOptions
from encfs.mount.protocol import MAX_ANSWER, one_line, peer
from encfs.mount.runtime import short_path
from encfs.mount.tuning import raise_read_ahead
from encfs.strictjson import MAX_INTEGER

#: Seconds for which requests wait for a daemon.
PATIENCE = 60.0

#: Conditions: before the first daemon; and how those with a daemon, and after its failure, begin.
_WAITING, _SERVING, _FAILED = "waiting for a daemon", "serving ", "failed: "

log = logging.getLogger("encfs.csi")


class Volume:
    """A published volume, until `close`. Raises at once what mounting raises."""

    def __init__(self, target: str, handover: Path, attributes: Mapping[str, str], daemon_user: int) -> None:
        self.target = target
        self.attributes = dict(attributes)
        self.condition = _WAITING
        #: Bytes of the images that are served; 0 until a daemon has said it.
        self.size = 0
        self._socket = handover
        self._user = daemon_user
        descriptor = open_mounted(target, MountOptions(allow_other=True))
        try:
            self._keeper = Keeper.begin(descriptor, target, attributes)
            self._server = _listen(handover, daemon_user)
        except BaseException:
            os.close(descriptor)
            with suppress(EncfsError):
                unmount(target, lazy=True)
            raise
        if (mine := top_mount(target)) is not None:
            major, minor = mine.device.split(":")
            raise_read_ahead(os.makedev(int(major), int(minor)), MAX_REQUEST)
        self._wake, self._waking = os.pipe2(os.O_CLOEXEC)
        self._channel: socket.socket | None = None
        self._lost = time.monotonic()
        self._received = b""
        self._thread = threading.Thread(target=self._run, name="encfs-volume", daemon=True)
        self._thread.start()

    @property
    def is_abnormal(self) -> bool:
        """Whether somebody ought to look: a daemon has failed, or none has come in time."""
        serving = self._channel is not None and self.condition.startswith(_SERVING)
        return self._failed or (not serving and time.monotonic() - self._lost > PATIENCE)

    @property
    def _failed(self) -> bool:
        return self.condition.startswith(_FAILED)

    def close(self) -> None:
        """Unmount, and end the connection, whoever has files open or serves them."""
        os.close(self._waking)
        self._thread.join()
        os.close(self._wake)
        with suppress(EncfsError):
            unmount_for_all(self.target)

    def _run(self) -> None:
        try:
            while self._step():
                continue
        except OSError as error:
            log.error("%s: %s", self.target, error)  # noqa: TRY400 - foreseen: the line says it all
        finally:
            self._leave("ended")
            self._server.close()
            self._socket.unlink(missing_ok=True)
            self._keeper.close()

    def _step(self) -> bool:
        refusing = self._channel is None and time.monotonic() - self._lost > PATIENCE
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._server, select.POLLIN)
        poller.register(self._keeper.descriptor, select.POLLIN if refusing else 0)
        if self._channel is not None:
            poller.register(self._channel, select.POLLIN)
        for descriptor, events in poller.poll(1000):
            if descriptor == self._wake:
                return False
            if descriptor == self._keeper.descriptor:
                if events & select.POLLERR or not refuse_requests(descriptor):
                    return False
            elif descriptor == self._server.fileno():
                self._accept()
            else:
                self._listen_to_daemon()
        return True

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as failure:
            log.warning("%s: a daemon cannot be let in: %s", self.target, failure.strerror)
            return
        _, user = peer(connection)
        error = None
        if user not in {0, self._user}:
            error = f"user {user} may not serve this volume"
        elif self._channel is not None:
            error = "this volume is being served already"
        if error is not None:
            log.warning("%s: a daemon is refused: %s", self.target, error)
            with suppress(OSError):
                connection.sendall(json.dumps({"error": error}).encode() + b"\n")
            connection.close()
            return
        try:
            self._keeper.hand_over(connection)
        except (OSError, MountError) as failure:
            log.warning("%s: the handover failed: %s", self.target, failure)
            connection.close()
            return
        connection.setblocking(False)
        self._channel, self._received = connection, b""
        self.condition = "a daemon is starting"
        log.info("%s: handed over to a daemon", self.target)

    def _listen_to_daemon(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            piece = channel.recv(MAX_ANSWER)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self._leave(self.condition if self._failed else "the daemon is gone")
            return
        *lines, rest = (self._received + piece).split(b"\n")
        self._received = rest if len(rest) <= MAX_ANSWER else b""
        for line in lines:
            with suppress(ValueError, RecursionError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self._note(event)

    def _note(self, event: Mapping[str, object]) -> None:
        try:
            self._keeper.note(event)
        except (OSError, MountError) as error:
            event = {"event": "failed", "message": str(error)}
        match event:
            case {"event": "ready"}:
                size = event.get("size")
                self.size = size if isinstance(size, int) and 0 <= size <= MAX_INTEGER else 0
                self.condition = f"{_SERVING}{self._keeper.content_digest}"
            case {"event": "failed", "message": str(text)}:
                # Whatever runs in the pod may have written this.
                self.condition = f"{_FAILED}{one_line(text)}"
            case _:
                return
        log.info("%s: %s", self.target, self.condition)

    def _leave(self, condition: str) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._lost = time.monotonic()
            self._keeper.restarts += 1
            self._keeper.reason = self.condition = condition
            log.warning("%s: %s", self.target, condition)


def _listen(path: Path, user: int) -> socket.socket:
    """A socket that only the daemon's user can connect to. Whoever is in the pod may have written to its directory."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    if not stat.S_ISDIR(path.parent.lstat().st_mode):
        raise MountError(f"{path.parent} is no directory")
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        with short_path(path) as address:
            server.bind(address)
            os.chown(address, user, user, follow_symlinks=False)
    except OSError as error:
        server.close()
        raise MountError(f"the socket {path} cannot be made: {error.strerror}") from None
    finally:
        os.umask(before)
    server.listen()
    return server
