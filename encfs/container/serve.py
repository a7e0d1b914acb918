"""Serve a container's files until its command has ended, pass signals on, and learn how it ended.

This process holds the keys, and serves FUSE on its main thread. Not here: the container's own process (`process`, which
starts it, and `init`, which it is).
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyfuse3
import trio

from encfs.container import channel as channels
from encfs.container.process import ContainerProcess
from encfs.container.spec import Spec
from encfs.errors import EncfsError, MountError
from encfs.mount import polling
from encfs.mount.failures import FailureLog
from encfs.mount.filesystem import ImageFilesystem
from encfs.mount.options import MOUNT_SOURCE
from encfs.mount.reading import ImageContents
from encfs.mount.session import initialise

#: What the terminal sends to the whole foreground process group, and so to the command as well.
_FROM_TERMINAL = frozenset({signal.SIGINT, signal.SIGQUIT})
_PASSED_ON = (*_FROM_TERMINAL, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_NO_WORD = "the container's process ended without a word"
#: Requests under way at the same time.
_MAX_TASKS = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it ended: the exit code, 128 + N after signal N; with `error` the command did not even begin."""

    code: int
    error: EncfsError | None = None


def serve(
    process: ContainerProcess, contents: ImageContents, spec: Spec, *, stop_signal: int = signal.SIGTERM
) -> Outcome:
    """Serve `contents` (what `spec` says the FUSE mount holds) until the command has ended.

    SIGTERM is passed on as `stop_signal`. Raises: MountError where the container's process fails.
    """
    content, served = channels.receive(process.channel)
    if served is None and not content:
        raise MountError(_NO_WORD)
    if served is None:
        return Outcome(process.wait(), channels.parse_error(content))
    filesystem = ImageFilesystem(contents, FailureLog())
    with _serving(filesystem, served):
        return trio.run(_run, process, spec, stop_signal)


async def _run(process: ContainerProcess, spec: Spec, stop_signal: int) -> Outcome:
    running = trio.Event()
    content, failure = b"", None
    # Before anybody may learn of its end: from then on, its number is nobody's.
    watched = os.pidfd_open(process.pid)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(_pass_signals_on, process, running, stop_signal)
            nursery.start_soon(_answer)
            try:
                content = await _begin(process, spec)
            except MountError as error:
                failure = error
                process.signal(signal.SIGKILL)
            running.set()
            await trio.lowlevel.wait_readable(watched)
            nursery.cancel_scope.cancel()
    finally:
        os.close(watched)
    code = process.wait()
    if failure is not None:
        return Outcome(failure.exit_code, failure)
    return Outcome(code, channels.parse_error(content) if content else None)


async def _begin(process: ContainerProcess, spec: Spec) -> bytes:
    """Say what is wanted: nothing is answered where the command runs. Raises: MountError."""
    try:
        channels.send(process.channel, spec.to_json())
        gc.collect()
        gc.freeze()
        await trio.lowlevel.wait_readable(process.channel)
        content, _ = channels.receive(process.channel)
    except OSError:
        raise MountError(_NO_WORD) from None
    return content


async def _answer() -> None:
    """Answer requests. That nobody asks any more is no reason to end: the command's end is."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


async def _pass_signals_on(
    process: ContainerProcess, running: trio.Event, stop_signal: int, *, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(*_PASSED_ON) as signals:
        task_status.started()
        async for number in signals:
            if not running.is_set():
                # There is no command yet that could take it: what waits for a store, perhaps, is given up.
                process.signal(signal.SIGKILL)
            elif number not in _FROM_TERMINAL or not _in_foreground():
                process.signal(stop_signal if number == signal.SIGTERM else number)


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
