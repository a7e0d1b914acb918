"""One volume of the node plugin: its FUSE connection, and the socket in the pod where the daemon fetches it.

The volume is mounted before any container of the pod runs. From then on requests wait for a daemon for `PATIENCE`
seconds, and fail with EIO until one comes; daemons may come and go, one at a time.

A plugin that is restarted has no descriptor of what it mounted. The daemon that serves it brings the connection back;
where that one has ended meanwhile, the mount is dead, and another one is made on top of it: it is seen wherever the
dead one was, by containers too whose mount propagation is HostToContainer. Not here: gRPC (`node`), what a plugin
knows of the plugin before it (`records`).
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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from encfs.csi.records import VolumeRecord
from encfs.errors import EncfsError, MountError
from encfs.mount.fusedevice import connection_number, open_mounted
from encfs.mount.handover import receive_message
from encfs.mount.keeper import Keeper
from encfs.mount.mountpoint import is_dead, top_mount, unmount, unmount_stack
from encfs.mount.options import MAX_REQUEST, MountOptions
from encfs.mount.protocol import MAX_ANSWER, one_line, peer
from encfs.mount.runtime import short_path
from encfs.mount.tuning import raise_read_ahead
from encfs.strictjson import MAX_INTEGER

#: Seconds for which requests wait for a daemon.
PATIENCE = 60.0
#: Seconds for a daemon that comes by to say that it brings a connection back: it does so at once.
_RETURN_PATIENCE = 2.0

#: Pieces of what a daemon said that are read before another one is refused because of it.
_LAST_WORDS = 4

#: Conditions: before the first daemon; and how those with a daemon, and after its failure, begin.
_WAITING, _SERVING, _FAILED = "waiting for a daemon", "serving ", "failed: "
_UNHEARD = "served by a daemon that has not brought its connection back to this plugin since it was restarted"
_ANEW = "mounted anew: the plugin and the daemon had both ended, and files that were open have failed"

log = logging.getLogger("encfs.csi")


class Volume:
    """A published volume, until `close`. Use `publish` or `restore`."""

    def __init__(
        self, record: VolumeRecord, handover: Path, daemon_user: int, save: Callable[[VolumeRecord], None]
    ) -> None:
        """`handover` is the socket in the pod. `save` gets the record when something of it has changed."""
        self.record = record
        self.target = record.target
        self.condition = _WAITING
        self._socket = handover
        self._user = daemon_user
        self._save = save
        self._server: socket.socket
        self._keeper: Keeper | None = None
        self._restarts = 0
        self._channel: socket.socket | None = None
        self._lost = time.monotonic()
        self._received = b""
        self._wake, self._waking = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="encfs-volume", daemon=True)

    @classmethod
    def publish(
        cls, record: VolumeRecord, handover: Path, daemon_user: int, save: Callable[[VolumeRecord], None]
    ) -> Volume:
        """Mount it. Raises: MountError."""
        volume = cls(record, handover, daemon_user, save)
        try:
            volume._mount()
            volume._server = _listen(handover, daemon_user)
        except BaseException:
            volume._abandon()
            raise
        volume._thread.start()
        return volume

    @classmethod
    def restore(
        cls, record: VolumeRecord, handover: Path, daemon_user: int, save: Callable[[VolumeRecord], None]
    ) -> Volume:
        """One that a plugin before this one has published, and that is mounted still. Raises: MountError."""
        volume = cls(record, handover, daemon_user, save)
        try:
            volume._server = _listen(handover, daemon_user)
        except BaseException:
            volume._abandon()
            raise
        volume.condition = _UNHEARD
        volume._thread.start()
        return volume

    @property
    def is_abnormal(self) -> bool:
        """Whether somebody ought to look: a daemon has failed, or none has come in time."""
        serving = self._channel is not None and self.condition.startswith(_SERVING)
        return self.has_ended or self._failed or (not serving and time.monotonic() - self._lost > PATIENCE)

    @property
    def has_ended(self) -> bool:
        """Whether it is not mounted any more, although nobody has closed it."""
        return not self._thread.is_alive()

    @property
    def _failed(self) -> bool:
        return self.condition.startswith(_FAILED)

    def close(self) -> None:
        """Unmount, and end the connection, whoever has files open or serves them. Raises: MountError."""
        if self._waking >= 0:
            os.close(self._waking)
            self._thread.join()
            os.close(self._wake)
            self._waking = -1
        unmount_stack(self.target)

    def _abandon(self) -> None:
        """What was begun and has not come about."""
        os.close(self._waking)
        os.close(self._wake)
        if self._keeper is not None:
            self._keeper.close()
            with suppress(EncfsError):
                unmount(self.target, lazy=True)

    # The connection

    def _mount(self) -> None:
        """On top of what is dead there, if anything is. Raises: MountError."""
        descriptor = open_mounted(self.target, MountOptions(allow_other=True))
        try:
            self._keeper = Keeper.begin(descriptor, self.target, self.record.attributes)
        except BaseException:
            with suppress(EncfsError):
                unmount(self.target, lazy=True)
            raise
        self._keeper.content_digest = self.record.content_digest
        self._keeper.manifest_digest = self.record.manifest_digest
        if (mine := top_mount(self.target)) is not None:
            major, minor = mine.device.split(":")
            raise_read_ahead(os.makedev(int(major), int(minor)), MAX_REQUEST)

    def _mount_anew(self) -> None:
        """Where nobody can answer any more. Does nothing where somebody can, or where nothing of ours is mounted."""
        mine = top_mount(self.target)
        if mine is None or not mine.is_ours or not is_dead(self.target):
            return
        try:
            self._mount()
        except MountError as error:
            self.condition = f"{_FAILED}{error}"
        else:
            self.condition = _ANEW
        self._lost = time.monotonic()
        log.warning("%s: %s", self.target, self.condition)

    def _run(self) -> None:
        try:
            if self._keeper is None:
                self._mount_anew()
            while self._step():
                continue
        except (OSError, EncfsError) as error:
            log.error("%s: %s", self.target, error)  # noqa: TRY400 - foreseen: the line says it all
        finally:
            self._leave("ended")
            self.condition = "it is not mounted any more"
            self._server.close()
            self._socket.unlink(missing_ok=True)
            if self._keeper is not None:
                self._keeper.close()

    def _step(self) -> bool:
        keeper = self._keeper
        refusing = self._channel is None and time.monotonic() - self._lost > PATIENCE
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._server, select.POLLIN)
        if keeper is not None:
            poller.register(keeper.descriptor, select.POLLIN if refusing else 0)
        if self._channel is not None:
            poller.register(self._channel, select.POLLIN)
        for descriptor, events in poller.poll(1000):
            if descriptor == self._wake:
                return False
            if keeper is not None and descriptor == keeper.descriptor:
                if events & select.POLLERR or not keeper.refuse_requests():
                    return self._outlive(keeper)
            elif descriptor == self._server.fileno():
                self._accept()
            else:
                self._listen_to_daemon()
        return True

    def _outlive(self, keeper: Keeper) -> bool:
        """The connection has ended: by an abort, after which there is another one, or because it was unmounted."""
        self._leave("the connection was ended by somebody else")
        self._keeper = None
        keeper.close()
        self._mount_anew()
        return self._keeper is not None

    # Daemons

    def _accept(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as failure:
            log.warning("%s: a daemon cannot be let in: %s", self.target, failure.strerror)
            return
        # The last one may have ended already.
        for _ in range(_LAST_WORDS):
            if self._channel is not None and select.select([self._channel], [], [], 0)[0]:
                self._listen_to_daemon()
        _, user = peer(connection)
        if user not in {0, self._user}:
            self._refuse(connection, f"user {user} may not serve this volume")
        elif self._channel is not None:
            self._refuse(connection, "this volume is being served already")
        elif self._keeper is None and self._is_brought_back(connection):
            self._begin(connection, f"{_SERVING}{self.record.content_digest}")
        else:
            if self._keeper is None:
                self._mount_anew()
            if self._keeper is None:
                self._refuse(connection, f"this volume is {self.condition}")
            else:
                self._hand_over(connection, self._keeper)

    def _refuse(self, connection: socket.socket, error: str) -> None:
        log.warning("%s: a daemon is refused: %s", self.target, error)
        with suppress(OSError):
            connection.sendall(json.dumps({"error": error}).encode() + b"\n")
        connection.close()

    def _hand_over(self, connection: socket.socket, keeper: Keeper) -> None:
        keeper.restarts, keeper.reason = self._restarts, "" if self.condition == _WAITING else self.condition
        try:
            keeper.hand_over(connection, bring_back=True)
        except (OSError, MountError) as failure:
            log.warning("%s: the handover failed: %s", self.target, failure)
            connection.close()
            return
        self._begin(connection, "a daemon is starting")

    def _is_brought_back(self, connection: socket.socket) -> bool:
        """Whether the daemon that serves the mount is at the other end, and gives its connection back."""
        descriptors: list[int] = []
        try:
            message = receive_message(connection, time.monotonic() + _RETURN_PATIENCE, descriptors)
            _check_returned(self.record, message, descriptors)
            keeper = Keeper.take_back(message, descriptors.pop(), self.target, self.record.attributes)
        except (OSError, MountError) as failure:
            log.info("%s: nothing is brought back: %s", self.target, failure)
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._keeper = keeper
        self._note_served(keeper)
        return True

    def _begin(self, connection: socket.socket, condition: str) -> None:
        connection.setblocking(False)
        self._channel, self._received = connection, b""
        self.condition = condition
        log.info("%s: %s", self.target, condition)

    def _listen_to_daemon(self) -> None:
        channel, keeper = self._channel, self._keeper
        if channel is None or keeper is None:
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
                    self._note(keeper, event)

    def _note(self, keeper: Keeper, event: Mapping[str, object]) -> None:
        try:
            keeper.note(event)
        except (OSError, MountError) as error:
            event = {"event": "failed", "message": str(error)}
        match event:
            case {"event": "ready"}:
                size = event.get("size")
                self._note_served(keeper, size if isinstance(size, int) and 0 <= size <= MAX_INTEGER else 0)
                self.condition = f"{_SERVING}{keeper.content_digest}"
            case {"event": "negotiated"}:
                self._note_served(keeper)
                return
            case {"event": "returned"} if keeper.content_digest:
                # It had lost this channel only, and not the plugin its descriptor.
                self.condition = f"{_SERVING}{keeper.content_digest}"
            case {"event": "failed", "message": str(text)}:
                # Whatever runs in the pod may have written this.
                self.condition = f"{_FAILED}{one_line(text)}"
            case _:
                return
        log.info("%s: %s", self.target, self.condition)

    def _note_served(self, keeper: Keeper, size: int = 0) -> None:
        """For the plugin after this one, if there is one."""
        record = replace(
            self.record,
            content_digest=keeper.content_digest,
            manifest_digest=keeper.manifest_digest,
            size=size or self.record.size,
        )
        if record != self.record:
            self.record = record
            try:
                self._save(record)
            except EncfsError as error:
                log.warning("%s: %s", self.target, error)

    def _leave(self, condition: str) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._lost = time.monotonic()
            self._restarts += 1
            self.condition = condition
            log.warning("%s: %s", self.target, condition)


def _check_returned(record: VolumeRecord, message: Mapping[str, object], descriptors: list[int]) -> None:
    """Raises MountError unless this may be the connection of a volume. Whatever runs in the pod may have sent it."""
    if message.get("event") != "returned" or len(descriptors) != 1:
        raise MountError("a connection that is brought back comes with one descriptor")
    mine, number = top_mount(record.target), connection_number(descriptors[0])
    if mine is not None and number not in {None, int(mine.device.partition(":")[2])}:
        raise MountError("it is of another connection than the one that is mounted")
    if record.content_digest not in {"", message.get("content_digest")}:
        raise MountError("it serves other content than it did")


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
