"""Stand behind a mount: hold its FUSE connection, start the daemon that serves it, and another when that one dies.

Open files and requests under way survive: they wait for the next daemon, or, when none comes within `PATIENCE`, fail
with EIO until one does. The supervisor never sees a key: each daemon gets it from the provider itself.

SIGHUP replaces the daemon (after an upgrade): its successor is started beside it, opens the artifact and goes through
the beginning of the FUSE session, and only when it is prepared does the old daemon end. Where it fails, nothing has
happened. SIGTERM ends the mount. Not here: serving (`session`), handing over (`keeper`).
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from encfs.errors import EncfsError, MountError, error_named
from encfs.mount.background import Report, run_in_background
from encfs.mount.client import clear_leftovers, is_abandoned
from encfs.mount.daemon import READY_TIMEOUT
from encfs.mount.daemonprocess import DaemonProcess, memory_kills, start
from encfs.mount.fusedevice import open_mounted
from encfs.mount.keeper import Keeper
from encfs.mount.kernel import closing
from encfs.mount.logs import logging_to
from encfs.mount.mountpoint import absolute, check_fuse, prepare, top_mount, unmount
from encfs.mount.options import MountOptions, MountStatus
from encfs.mount.protocol import MAX_REQUEST_LINE, peer
from encfs.mount.runtime import listen, log_path, remove_own_files, runtime_directory, socket_path

#: Seconds for which requests wait for the next daemon; from then on they fail with EIO until there is one.
PATIENCE = 60.0
#: Seconds between two starts: the first follows at once, the next ones double up to the last.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 30.0
#: A daemon that served for so many seconds is no part of a crash loop.
_STEADY = 10.0
#: Seconds that a daemon gets to end.
_GRACE = 10.0
#: Seconds that a daemon, and somebody at the control socket, get for their lines.
_RELAY_PATIENCE = 2.0
#: Seconds to leave a caller waiting who cannot be accepted now.
_ACCEPT_PAUSE = 0.05

log = logging.getLogger("encfs.mount")


class Supervisor:
    """One mount, from before its first daemon to after its last."""

    def __init__(self, words: Sequence[str], place: str, options: MountOptions, reference: str, directory: int) -> None:
        """`words` start a daemon once `--fuse-fd N` is added to them. `place` is a fit mount point, absolute.

        `directory` is a descriptor of where the words were given: paths in them are meant from there.
        """
        self._words = words
        self._place = place
        self._options = options
        self._reference = reference
        self._directory = directory
        self._daemon: DaemonProcess | None = None
        #: What is to follow it, and when the old one was told to end for it.
        self._successor: DaemonProcess | None = None
        self._ending: float | None = None
        self._refusal = ""
        self._lost = time.monotonic()
        self._next_start = 0.0
        self._pause = _FIRST_PAUSE
        self._stopping = self._replacing = False
        self._device = ""
        self._started = time.time()

    def run(self, on_ready: Callable[[MountStatus], None]) -> None:
        """Until the mount has ended. Raises: EncfsError where it does not come about at all."""
        directory = runtime_directory()
        descriptor = open_mounted(self._place, self._options)
        try:
            mine = top_mount(self._place)
            self._device = mine.device if mine is not None else ""
            with ExitStack() as stack:
                self._keeper = Keeper.begin(descriptor, self._place)
                stack.callback(self._keeper.close)
                self._serve(directory, on_ready)
        finally:
            mine = top_mount(self._place)
            if mine is not None and mine.is_ours and mine.device == self._device:
                with suppress(EncfsError):
                    unmount(self._place, lazy=True)
            remove_own_files(directory, self._place)

    def _serve(self, directory: Path, on_ready: Callable[[MountStatus], None]) -> None:
        self._server = listen(socket_path(directory, self._place))
        self._wake, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writing)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._obey)
        try:
            self._start()
            self._loop(on_ready)
        finally:
            self._end_daemons()

    def _obey(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._replacing = True
        else:
            self._stopping = True

    # The loop

    def _loop(self, on_ready: Callable[[MountStatus], None]) -> None:
        served = False
        while True:
            self._wait()
            if self._stopping or not self._connected():
                return
            daemon = self._daemon
            if daemon is not None and daemon.ready and not served:
                served = True
                on_ready(self._status_of_daemon(daemon))
            if daemon is not None and daemon.process.poll() is not None:
                self._listen_to(daemon)
                if not served:
                    raise daemon.error or MountError(
                        "the mount's daemon ended before it was ready", hint="mount without --supervise to see why"
                    )
                if daemon.process.returncode == 0 and self._ending is None:
                    return
                self._lose(daemon)
            self._replace()
            if self._daemon is None and self._successor is None and time.monotonic() >= self._next_start:
                self._start_again()
            if self._refusing and not self._keeper.refuse_requests():
                return

    @property
    def _refusing(self) -> bool:
        negotiated = self._daemon is not None and self._daemon.negotiated
        return not negotiated and time.monotonic() - self._lost > PATIENCE

    def _connected(self) -> bool:
        """Whether the mount is still there: the kernel says so when its last place is gone."""
        poller = select.poll()
        poller.register(self._keeper.descriptor, 0)
        return not poller.poll(0)

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self._server, select.POLLIN)
        poller.register(self._keeper.descriptor, select.POLLIN if self._refusing else 0)
        daemons = [one for one in (self._daemon, self._successor) if one is not None]
        for daemon in daemons:
            poller.register(daemon.watch, select.POLLIN)
            poller.register(daemon.channel, select.POLLIN)
        for descriptor, _ in poller.poll(self._longest_wait() * 1000):
            if descriptor == self._wake:
                with suppress(BlockingIOError):
                    os.read(self._wake, 64)
            elif descriptor == self._server.fileno():
                self._converse()
            else:
                for daemon in daemons:
                    if descriptor == daemon.channel.fileno():
                        self._listen_to(daemon)

    def _longest_wait(self) -> float:
        now = time.monotonic()
        if self._successor is not None:
            return 1.0
        if self._daemon is None:
            return max(0.0, min(self._next_start - now, 1.0))
        return 5.0 if self._daemon.negotiated or self._refusing else 1.0

    # Daemons

    def _start(self) -> None:
        """Raises: MountError."""
        self._daemon = self._spawn(self._hand_over)

    def _replace(self) -> None:
        """Take the next step towards another daemon, where there is one to be taken."""
        daemon, successor = self._daemon, self._successor
        if self._replacing and successor is None:
            self._replacing = False
            self._prepare()
        elif successor is None:
            return
        elif successor.process.poll() is not None:
            self._listen_to(successor)
            self._refuse(str(successor.error or f"it ended with exit code {successor.process.returncode}"))
        elif not successor.prepared:
            if time.monotonic() - successor.started > READY_TIMEOUT:
                self._refuse(f"it was not prepared within {READY_TIMEOUT:g} seconds")
        elif daemon is None:
            self._daemon, self._successor = successor, None
            self._give(successor, self._hand_over)
        elif self._ending is None:
            self._ending = time.monotonic()
            daemon.process.terminate()
        elif time.monotonic() - self._ending > _GRACE:
            daemon.process.kill()

    def _prepare(self) -> None:
        if self._daemon is None or not self._daemon.negotiated:
            return  # the next one is a new one anyway
        self._refusal = ""
        try:
            self._successor = self._spawn(lambda channel: self._keeper.rehearse(channel, relayed=True))
        except MountError as error:
            self._refusal = f"not replaced: {error}"
            log.warning("%s: %s", self._place, self._refusal)

    def _refuse(self, why: str) -> None:
        """The successor is no use. The daemon serves on, unless it has ended meanwhile by itself."""
        successor, self._successor, self._ending = self._successor, None, None
        self._refusal = f"not replaced: {why}"
        log.warning("%s: %s", self._place, self._refusal)
        if successor is not None:
            successor.process.kill()
            successor.process.wait()
            successor.forget()

    def _hand_over(self, channel: socket.socket) -> None:
        self._keeper.hand_over(channel, relayed=True)

    def _give(self, daemon: DaemonProcess, give: Callable[[socket.socket], None]) -> None:
        daemon.channel.setblocking(True)
        try:
            give(daemon.channel)
        except (OSError, MountError) as error:
            # It has ended already, or waits in vain.
            log.warning("%s: the handover failed: %s", self._place, error)
            daemon.process.terminate()
        daemon.channel.setblocking(False)

    def _spawn(self, give: Callable[[socket.socket], None]) -> DaemonProcess:
        """A new daemon that was given what `give` sends. Raises: MountError."""
        try:
            daemon = start(self._words, self._directory)
        except OSError as error:
            raise MountError(f"the mount's daemon cannot be started: {error.strerror}") from None
        self._give(daemon, give)
        return daemon

    def _start_again(self) -> None:
        """What keeps a daemon from being started now, such as an upgrade under way, may have passed the next time."""
        try:
            self._start()
        except MountError as error:
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            self._next_start = time.monotonic() + self._pause
            self._keeper.reason = error.message
            log.warning("%s: %s", self._place, error.message)

    def _lose(self, daemon: DaemonProcess) -> None:
        code = daemon.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if -code == signal.SIGKILL and memory_kills() > daemon.memory_kills:
            how += ", and the kernel has killed for lack of memory meanwhile"
        replaced = self._ending is not None
        self._keeper.reason = "replaced" if replaced else f"{how}: {daemon.error}" if daemon.error else how
        steady = daemon.ready and time.monotonic() - daemon.started > _STEADY
        if daemon.negotiated:
            self._lost = time.monotonic()
        self._pause = _FIRST_PAUSE if steady or replaced else min(self._pause * 2, _LONGEST_PAUSE)
        # The first start follows at once: whatever killed the daemon need not kill the next one.
        self._next_start = time.monotonic() + (0.0 if steady or replaced or daemon.ready else self._pause)
        self._keeper.restarts += 1
        log.warning("%s: the daemon %d was lost: %s", self._place, daemon.process.pid, self._keeper.reason)
        self._ending = None
        self._daemon = None
        daemon.forget()

    def _end_daemons(self) -> None:
        daemons = [one for one in (self._daemon, self._successor) if one is not None]
        self._daemon = self._successor = None
        for daemon in daemons:
            daemon.process.terminate()
        for daemon in daemons:
            try:
                daemon.process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()
            daemon.forget()

    def _listen_to(self, daemon: DaemonProcess) -> None:
        for message in daemon.receive():
            self._note(daemon, message)

    def _note(self, daemon: DaemonProcess, message: Mapping[str, object]) -> None:
        if "event" not in message:
            daemon.answers.append(message)
            return
        try:
            self._keeper.note(message)
        except (OSError, MountError) as error:
            log.warning("%s: the daemon's message is of no use: %s", self._place, error)
        match message:
            case {"event": "prepared"}:
                daemon.prepared = True
            case {"event": "negotiated"}:
                daemon.negotiated = True
            case {"event": "ready"}:
                daemon.ready = True
            case {"event": "failed", "error": str(name), "message": str(text), "hint": str() | None as hint}:
                daemon.error = error_named(name, text, hint)

    # The control socket

    def _converse(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:
            # Whoever calls is still there the next time, and so may be what is lacking (descriptors).
            time.sleep(_ACCEPT_PAUSE)
            return
        with suppress(OSError, ValueError, RecursionError), connection:
            connection.settimeout(_RELAY_PATIENCE)
            _, user = peer(connection)
            if user not in {0, os.geteuid()}:
                return
            request = json.loads(connection.makefile("rb").readline(MAX_REQUEST_LINE))
            match request:
                case {"op": "status"}:
                    answer: Mapping[str, object] = {"ok": True, "status": self._status().to_json()}
                case {"op": "stop"}:
                    answer = {"ok": True}
                    self._stopping = True
                case _:
                    answer = {"ok": False, "error": "unknown operation"}
            connection.sendall(json.dumps(answer).encode() + b"\n")

    def _status(self) -> MountStatus:
        daemon = self._daemon
        if daemon is not None and daemon.ready and daemon.process.poll() is None:
            return self._status_of_daemon(daemon)
        return self._own_status("failing" if self._refusing else "restarting")

    def _own_status(self, state: str) -> MountStatus:
        return MountStatus(
            self._place,
            state,  # type: ignore[arg-type]
            device=self._device,
            reference=self._reference,
            content_digest=self._keeper.content_digest,
            manifest_digest=self._keeper.manifest_digest,
            started=self._started,
            log_file=str(self._options.log_file or ""),
            supervisor=os.getpid(),
            restarts=self._keeper.restarts,
            reason=self._keeper.reason,
        )

    def _status_of_daemon(self, daemon: DaemonProcess) -> MountStatus:
        daemon.answers.clear()
        deadline = time.monotonic() + _RELAY_PATIENCE
        with suppress(OSError):
            daemon.channel.sendall(b'{"op": "status"}\n')
            while not daemon.answers and (left := deadline - time.monotonic()) > 0:
                if not select.select([daemon.channel.fileno(), daemon.watch], [], [], left)[0]:
                    break
                self._listen_to(daemon)
                if daemon.process.poll() is not None:
                    break
        for answer in daemon.answers:
            # After an upgrade the daemon may be of another version.
            if (status := MountStatus.from_json(answer.get("status"))) is not None:
                return replace(status, reason=self._refusal or status.reason)
        return self._own_status("silent")


def supervise(
    words: Sequence[str],
    mountpoint: str,
    options: MountOptions,
    reference: str,
    on_ready: Callable[[MountStatus], None],
) -> None:
    """Mount, with a supervisor behind the daemon; `words` start a daemon once `--fuse-fd N` is added to them.

    In the background it returns once the mount answers, in the foreground when it has ended.
    Raises: EncfsError, what the first daemon reports among them.
    """
    place = absolute(mountpoint)
    prepare(place, is_abandoned)
    clear_leftovers(place)
    check_fuse(allow_other=options.allow_other)
    with closing(os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) as directory:
        if options.foreground:
            with logging_to(options.log_file, options.log_format):
                Supervisor(words, place, options, reference, directory).run(on_ready)
            return
        report = run_in_background(
            lambda report: _background(words, place, options, reference, directory, report), timeout=READY_TIMEOUT
        )
    on_ready(MountStatus(**report))  # type: ignore[arg-type]


def _background(
    words: Sequence[str], place: str, options: MountOptions, reference: str, directory: int, report: Report
) -> int:
    try:
        # One log for supervisor and daemons, which goes with the mount unless it was asked for.
        file = options.log_file or log_path(runtime_directory(), place)
        with logging_to(file, options.log_format):
            supervisor = Supervisor(
                [*words, "--log-file", str(file)], place, replace(options, log_file=file), reference, directory
            )
            supervisor.run(lambda status: report.ready(status.to_json()))
    except EncfsError as error:
        report.failed(error)
        return error.exit_code
    return 0
