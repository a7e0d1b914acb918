"""One mount from the call to the kernel to its end: pyfuse3's session, the event loop, and what runs on it.

Not here: requests (`filesystem`), the control protocol (`control`), foreground and background (`daemon`).
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyfuse3
import trio

from encfs import tracing
from encfs.encoding import b64_encode
from encfs.errors import EncfsError, MountError, StorageError
from encfs.mount import control, health, polling
from encfs.mount.assembly import Recipe, assemble_apart, attach_at, open_fuse
from encfs.mount.companion import Companion, NoCompanion
from encfs.mount.failures import FailureLog
from encfs.mount.filesystem import ImageFilesystem
from encfs.mount.handover import Handover
from encfs.mount.metrics import render
from encfs.mount.mountpoint import top_mount, unmount
from encfs.mount.negotiation import Placeholder
from encfs.mount.notify import notify, watchdog_interval
from encfs.mount.options import MOUNT_SOURCE, MountOptions, MountStatus
from encfs.mount.reading import ImageContents
from encfs.mount.returning import Returning, bring_back
from encfs.mount.runtime import listen, runtime_directory, socket_path
from encfs.mount.tuning import raise_read_ahead

#: Seconds that requests under way get when a mount is told to end.
_GRACE = 2.0
#: Seconds for the first answer through the kernel; what the store needs for it gives up earlier.
_ANSWER_TIMEOUT = 100.0
#: Requests under way at the same time, most of them waiting for disk or network.
_MAX_TASKS = 64
#: Bytes of libfuse's messages that are looked at.
_MAX_SAID = 4096

log = logging.getLogger("encfs.mount")

OnReady = Callable[[MountStatus], None]


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What is to be mounted, and where. `log_file` is where this process logs, None for stderr.

    `recipe` says what the kernel makes of the FUSE mount, which nobody sees then. With `handover` somebody else has
    mounted it, and unmounts it.
    """

    mountpoint: str
    options: MountOptions
    reference: str
    content_digest: str
    manifest_digest: str
    contents: ImageContents
    log_file: Path | None
    recipe: Recipe | None = None
    companion: Companion = field(default_factory=NoCompanion)
    handover: Handover | None = None
    audit: Mapping[str, object] = field(default_factory=dict)


class Session:
    """One mount while it is served."""

    def __init__(self, plan: MountPlan, on_ready: OnReady) -> None:
        self._plan = plan
        self._on_ready = on_ready
        self._failures = FailureLog()
        self._filesystem = ImageFilesystem(plan.contents, self._failures, enable_acl=plan.options.default_permissions)
        self._requests = trio.CancelScope()
        self._stopping = False
        self._error: EncfsError | None = None
        self._unattached = -1
        self._ready = False
        self._announced = trio.Event()
        self._returning: Returning | None = None
        handover = plan.handover
        self._listener: socket.socket | None = None
        if handover is None or not handover.rehearse:
            self._listen()
        self._base = MountStatus(
            mountpoint=plan.mountpoint,
            state="serving",
            pid=os.getpid(),
            reference=plan.reference,
            content_digest=plan.content_digest,
            manifest_digest=plan.manifest_digest,
            started=time.time(),
            log_file=str(plan.log_file or ""),
            backend=plan.recipe.backend if plan.recipe is not None else "fuse",
            writable=plan.recipe is not None and plan.recipe.writable,
            supervisor=handover.supervisor if handover is not None else 0,
            restarts=handover.restarts if handover is not None else 0,
            reason=handover.reason if handover is not None else "",
        )

    def _listen(self) -> None:
        """Where a predecessor listens, only once that one has ended. Raises: MountError, UsageError."""
        if self._plan.options.listen is not None:
            self._listener = health.listen_at(self._plan.options.listen)

    def status(self) -> MountStatus:
        stats = dict(self._plan.contents.volume.stats.to_json())
        stats["requests_failed"] = self._failures.count
        stats["requests_waited"] = self._filesystem.waits
        companion = self._plan.companion
        return replace(self._base, stats=stats, transfer=companion.transfer(), prefetch=companion.prefetch())

    def finish(self) -> MountStatus:
        """The last status, or what kept the mount from becoming ready."""
        if self._error is not None:
            raise self._error
        return self.status()

    def close(self) -> None:
        """Nothing is left of a session that did not come to run. Harmless for one that did."""
        if self._listener is not None:
            health.discard(self._listener)

    @contextmanager
    def mounted(self) -> Iterator[None]:
        """Mount; unmount at the end unless somebody has done so, or has mounted something else there since."""
        place = self._plan.mountpoint
        before = polling.fuse_descriptors()
        if self._plan.handover is not None:
            self._take_over(self._plan.handover)
            self._note_device()
        elif self._plan.recipe is None:
            initialise(self._filesystem, place, self._plan.options.kernel_options())
            self._note_device()
        else:
            served, self._unattached = open_fuse(allow_other=False, default_permissions=True)
            initialise(self._filesystem, f"/dev/fd/{served}", frozenset({f"fsname={MOUNT_SOURCE}"}))
        new = polling.fuse_descriptors() - before
        stop_polling = polling.install(next(iter(new)), self._filesystem) if len(new) == 1 else None
        self._base = replace(self._base, polling=stop_polling is not None)
        try:
            yield
        finally:
            if stop_polling is not None:
                stop_polling()
            # Closing first ends the connection: what still waits for an answer gets its error, and nobody blocks.
            pyfuse3.close(unmount=False)
            if self._unattached >= 0:
                os.close(self._unattached)
            mine = top_mount(place)
            theirs = self._plan.handover is not None
            if mine is not None and mine.is_ours and mine.device == self._base.device and not theirs:
                _detach(place)

    def _take_over(self, handover: Handover) -> None:
        """Serve a connection that somebody else opened. Raises: MountError, UnsupportedError."""
        mine = top_mount(self._plan.mountpoint)
        if mine is not None and not mine.is_fuse:
            raise MountError(
                f"what is mounted at {self._plan.mountpoint} is {mine.filesystem_type}, and no FUSE mount",
                hint="the descriptor that was handed over is mounted elsewhere",
            )
        placeholder = Placeholder()
        initialise(self._filesystem, placeholder.path, self._plan.options.kernel_options())
        try:
            reply = placeholder.rehearse(handover.connection)
            if handover.rehearse:
                handover = handover.await_descriptor()
                self._base = replace(self._base, restarts=handover.restarts, reason=handover.reason)
                self._listen()
            placeholder.begin(handover.connection, reply)
        except BaseException:
            pyfuse3.close(unmount=False)
            raise
        # From here on requests are answered, and the kernel keeps what it gets: a successor must serve the same.
        served = {
            "init_reply": b64_encode(reply),
            "content_digest": self._plan.content_digest,
            "manifest_digest": self._plan.manifest_digest,
        }
        handover.tell("negotiated", **served)
        if handover.home:
            request = b64_encode(handover.connection.init_request)
            self._returning = Returning(handover.home, placeholder.descriptor, {"init_request": request, **served})

    def _note_device(self) -> None:
        mine = top_mount(self._plan.mountpoint)
        self._base = replace(self._base, device=mine.device if mine is not None else "")

    async def run(self, server: socket.socket | None) -> None:
        """Answer requests until the mount ends. `server` None: whoever handed the mount over answers at a socket."""
        async with trio.open_nursery() as nursery:
            if threading.current_thread() is threading.main_thread():
                await nursery.start(self._obey_signals)
            if server is not None:
                nursery.start_soon(control.serve, server, self._describe, self.stop)
            if self._plan.handover is not None and self._plan.handover.channel is not None:
                nursery.start_soon(self._answer_giver, self._plan.handover.channel)
            if self._listener is not None:
                probes = health.Probes(lambda: self._ready and not self._stopping, self._metrics)
                nursery.start_soon(health.serve, self._listener, probes)
            if (interval := watchdog_interval()) is not None:
                nursery.start_soon(self._show_life, interval)
            nursery.start_soon(self._announce)
            with self._requests:
                await pyfuse3.main(max_tasks=_MAX_TASKS)
            log.info("%s: ended", self._plan.mountpoint)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """End: requests under way get a moment."""
        if not self._stopping:
            self._stopping = True
            if not self._base.supervisor:
                notify("STOPPING=1")
            pyfuse3.terminate()
            self._requests.deadline = trio.current_time() + _GRACE

    async def _answer_giver(self, channel: socket.socket) -> None:
        """Answer whoever handed the mount over. Where that one goes, the mount goes on, and is asked for here."""
        await control.serve_channel(channel, self._describe, self.stop)
        log.warning("%s: whoever handed the mount over is gone", self._plan.mountpoint)
        if self._plan.handover is not None and self._plan.handover.relayed:
            try:
                server = listen(socket_path(runtime_directory(), self._plan.mountpoint))
            except StorageError as error:
                log.warning("%s: it goes on, and nobody can ask for it: %s", self._plan.mountpoint, error)
                return
            await control.serve(server, self._describe, self.stop)
        elif self._returning is not None:
            await self._announced.wait()
            await bring_back(self._returning, lambda channel: control.serve_channel(channel, self._describe, self.stop))

    async def _show_life(self, interval: float) -> None:
        while True:
            notify("WATCHDOG=1")
            await trio.sleep(interval)

    def _metrics(self) -> str:
        return render(self.status(), self._filesystem.times, ready=self._ready)

    def _describe(self) -> dict[str, object]:
        return self.status().to_json()

    async def _obey_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("%s: ending on %s", self._plan.mountpoint, signal.Signals(number).name)
                self.stop()

    async def _assemble(self) -> tuple[int, ...]:
        """Have the kernel make of the FUSE mount what the plan says, and attach that. The devices below it.

        Raises: OSError, MountError.
        """
        if self._plan.recipe is None:
            return ()
        assembled = await trio.to_thread.run_sync(
            assemble_apart, self._unattached, self._plan.recipe, self._plan.mountpoint, abandon_on_cancel=True
        )
        os.close(self._unattached)
        self._unattached = -1
        attach_at(assembled, self._plan.mountpoint)
        self._note_device()
        return assembled.devices

    async def _announce(self) -> None:
        """Once the mount answers through the kernel: tune it, and say that it is ready."""
        place = self._plan.mountpoint
        try:
            below = await self._assemble()
            seen = self._plan.handover is None or bool(self._base.device)
            if not seen:
                # Mounted where this process does not look: that the kernel was answered is all that can be told.
                self._announce_ready()
                await self._trace()
                return
            with trio.fail_after(_ANSWER_TIMEOUT):
                device = await trio.to_thread.run_sync(_check_answers, place, abandon_on_cancel=True)
        except trio.TooSlowError:
            self._error = self._failures.last or MountError(
                f"the mount at {place} does not answer within {_ANSWER_TIMEOUT:g} seconds",
                hint="if a descriptor was handed over: is it mounted there?",
            )
            self.stop()
            return
        except (OSError, MountError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.message
            self._error = self._failures.last or MountError(f"the mount at {place} does not answer: {reason}")
            self.stop()
            return
        sizes = [raise_read_ahead(one, self._plan.options.max_read_ahead) for one in below or (device,)]
        # Of EROFS from a file it is not known: what counts there is that of the FUSE mount below.
        read_ahead = min((size for size in sizes if size), default=0)
        self._base = replace(self._base, read_ahead=read_ahead)
        self._announce_ready()
        await self._trace()

    async def _trace(self) -> None:
        """Begin to send traces, where they are asked for: now that nobody waits for this process any more."""
        if tracing.is_wanted():
            about = {"encfs.content_digest": self._plan.content_digest, "encfs.reference": self._plan.reference}
            await trio.to_thread.run_sync(tracing.start, about, abandon_on_cancel=True)

    def _announce_ready(self) -> None:
        # What has lived until now lives to the end: the collector need not look at it again. Nor now, since somebody
        # waits for the first answer, and there is little to be found.
        gc.freeze()
        log.info("%s: mounted %s %s", self._plan.mountpoint, self._plan.reference, self._plan.content_digest)
        if self._plan.audit:
            said = ", ".join(f"{name} {value}" for name, value in self._plan.audit.items())
            log.info("audit: %s", said, extra={"audit": dict(self._plan.audit)})
        self._plan.companion.start()
        self._ready = True
        self._announced.set()
        notify(f"READY=1\nSTATUS=serving {self._plan.mountpoint}")
        self._on_ready(self.status())


def _check_answers(mountpoint: str) -> int:
    """Stat the root of the mount and read its directory, through the kernel. Returns its `st_dev`. Not on the loop."""
    device = os.stat(mountpoint).st_dev
    try:
        with os.scandir(mountpoint) as entries:
            next(entries, None)
    except PermissionError:
        # An answer, too: the image does not let this user in.
        log.info("%s: this user may not read the root directory", mountpoint)
    return device


def initialise(filesystem: ImageFilesystem, mountpoint: str, options: frozenset[str]) -> None:
    """Mount. libfuse says on stderr what went wrong: that is caught and becomes the message."""
    # In memory: a container may have no place to write to.
    with open(os.memfd_create("libfuse"), "w+b") as messages:
        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(messages.fileno(), 2)
        try:
            pyfuse3.init(filesystem, mountpoint, set(options))
        except RuntimeError as error:
            messages.seek(0)
            said = messages.read(_MAX_SAID).decode(errors="replace").split("\n")[0].strip()
            raise MountError(
                f"{mountpoint} cannot be mounted: {said or error}",
                hint="does this user own the mount point, and is FUSE allowed here?",
            ) from None
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _detach(mountpoint: str) -> None:
    try:
        unmount(mountpoint, lazy=True)
    except EncfsError as error:
        log.error("%s", error)  # noqa: TRY400 - foreseen: the line says it all
