"""Run a container to its end: serve its files, pass signals on, and learn how its command ended.

This process holds the keys and serves FUSE on its main thread. The container is another one (`init`), started with an
empty environment before the artifact is opened, so that both are ready at about the same time.
"""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import pyfuse3
import trio

from encfs.container import channel as channels
from encfs.container.spec import Spec
from encfs.errors import EncfsError, MountError
from encfs.mount import polling
from encfs.mount.failures import FailureLog
from encfs.mount.filesystem import ImageFilesystem
from encfs.mount.mountpoint import MOUNT_SOURCE
from encfs.mount.reading import ImageContents
from encfs.mount.session import initialise

#: What the terminal sends to the whole foreground process group, and so to the command as well.
_FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT})
_PASSED_ON = (*_FROM_TERMINAL, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
#: Requests under way at the same time.
_MAX_TASKS = 64
#: Seconds that a container gets to end when it is not to be any more.
_PATIENCE = 5.0

log = logging.getLogger("encfs.mount")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: the exit code, 128 + N after signal N; with `error` the command did not even begin."""

    code: int
    error: EncfsError | None = None


class Container:
    """A container from its process's start on. A context manager: nothing of it is left at the end."""

    def __init__(self) -> None:
        """Starts the process. Raises: MountError."""
        ours, theirs = socket.socketpair()
        self._channel = ours
        with theirs:
            words = [sys.executable, "-I", "-m", "encfs.container.init", str(theirs.fileno())]
            self._process = subprocess.Popen(words, env={}, pass_fds=[theirs.fileno()], close_fds=True)
        # No core dump of a process that is about to hold keys; the container's limit stays what it was.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_PATIENCE)

    def run(self, contents: ImageContents, spec: Spec, *, stop_signal: int = signal.SIGTERM) -> Outcome:
        """Serve `contents` (what `spec` says the FUSE mount holds) until the command has ended.

        SIGTERM is passed on as `stop_signal`. Raises: MountError where the container's process fails.
        """
        content, served = channels.receive(self._channel)
        if served is None:
            return Outcome(self._process.wait(), channels.parse_error(content) if content else _silent())
        filesystem = ImageFilesystem(contents, FailureLog())
        with _serving(filesystem, served):
            return trio.run(self._run, spec, stop_signal)

    async def _run(self, spec: Spec, stop_signal: int) -> Outcome:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._pass_signals_on, stop_signal)
            nursery.start_soon(_serve)
            channels.send(self._channel, spec.to_json())
            gc.collect()
            gc.freeze()
            error = await self._await_start()
            watched = os.pidfd_open(self._process.pid)
            try:
                await trio.lowlevel.wait_readable(watched)
            finally:
                os.close(watched)
            code = self._process.wait()
            nursery.cancel_scope.cancel()
        return Outcome(exit_code_of(code), error)

    async def _await_start(self) -> EncfsError | None:
        """Until the command runs, or not: why not."""
        await trio.lowlevel.wait_readable(self._channel)
        content, _ = channels.receive(self._channel)
        return channels.parse_error(content) if content else None

    async def _pass_signals_on(self, stop_signal: int, *, task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*_PASSED_ON) as signals:
            task_status.started()
            async for number in signals:
                if number in _FROM_TERMINAL and _in_foreground():
                    continue
                self._process.send_signal(stop_signal if number == signal.SIGTERM else number)


async def _serve() -> None:
    """Answer requests. That the mount is gone is no reason to end: its command's end is."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


@contextmanager
def _serving(filesystem: ImageFilesystem, descriptor: int) -> Iterator[None]:
    initialise(filesystem, f"/dev/fd/{descriptor}", frozenset({f"fsname={MOUNT_SOURCE}"}))
    stop_polling = polling.install(descriptor, filesystem)
    try:
        yield
    finally:
        if stop_polling is not None:
            stop_polling()
        pyfuse3.close(unmount=False)


def _in_foreground() -> bool:
    """Whether the terminal sends its signals to this process, and to the command."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def exit_code_of(code: int) -> int:
    """Of what subprocess says: 128 + N for signal N."""
    return code if code >= 0 else 128 - code


def _silent() -> MountError:
    return MountError("the container's process ended without a word")
