"""Go on in a background process, and learn from it whether it has become ready, or why not.

Not here: what the process does (`daemon`).
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Set
from typing import NoReturn

from encfs.errors import EncfsError, MountError, error_named
from encfs.hardening import protect_keys

_MAX_REPORT = 1 << 20
#: Seconds until a daemon whose start is given up has said which process it is: the first thing that it does.
_PATIENCE = 30.0
_INTERRUPTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class Report:
    """The child's end of the pipe to the process that started it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor

    def ready(self, value: Mapping[str, object]) -> None:
        """The start succeeded. Only the first report counts."""
        self._send({"ready": value})

    def failed(self, error: EncfsError) -> None:
        """The start failed."""
        self._send({"error": type(error).__name__, "message": error.message, "hint": error.hint})

    def _send(self, message: Mapping[str, object]) -> None:
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            with open(descriptor, "wb") as pipe:
                pipe.write(json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            return  # nobody waits any more


def run_in_background(main: Callable[[Report], int], *, timeout: float) -> Mapping[str, object]:
    """Run `main` in a daemon process; return what it reports as ready, within `timeout` seconds.

    `main` gets a `Report`, and returns the exit code of the process. It does not return to the caller's code: exit
    handlers and `finally` blocks outside of it are the starting process's own.
    Raises: the EncfsError that the process reports; MountError where it ends without a word or is not ready in time.
    """
    if threading.active_count() > 1:
        # A fork keeps the locks of the other threads, and not the threads.
        raise MountError(
            "a process with several threads cannot go to the background",
            hint="mount in the foreground, or from a new process",
        )
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    # An interrupt waits until there is somebody who ends the daemon for it, and is none of the children's.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPTS)
    first = os.fork()
    if first == 0:
        _become_daemon(main, reading, writing, mask)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        return _await_report(pipe.fileno(), first, mask, timeout)


def _become_daemon(main: Callable[[Report], int], reading: int, writing: int, mask: Set[int]) -> NoReturn:
    """In the first child: leave session and parent, then run."""
    code = 1
    try:
        os.close(reading)
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(writing, json.dumps({"pid": os.getpid()}).encode() + b"\n")
        os.chdir("/")
        os.umask(0o077)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        protect_keys()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        code = main(Report(writing))
    finally:
        # The exit handlers are the starting process's.
        os._exit(code)


def _await_report(descriptor: int, first: int, mask: Set[int], timeout: float) -> Mapping[str, object]:
    """What comes through the pipe; `first` is the child that only starts the daemon, `mask` the signals blocked before.

    The daemon is ended where this is interrupted or takes too long.
    """
    deadline = time.monotonic() + timeout
    received = b""
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.waitpid(first, 0)
        # The process number is one line, the report another; then the pipe is closed.
        while len(received) < _MAX_REPORT and (piece := _read_before(descriptor, deadline)):
            received += piece
    except BaseException as error:
        _end(descriptor, received)
        if isinstance(error, TimeoutError):
            raise MountError(
                f"the mount is not ready within {timeout:g} seconds", hint="is the place reachable that it reads from?"
            ) from None
        raise
    lines = received.splitlines()
    if len(lines) < 2:
        raise MountError("the mount's daemon ended before it was ready", hint="mount with --foreground to see why")
    message = json.loads(lines[1])
    if "ready" in message:
        ready: Mapping[str, object] = message["ready"]
        return ready
    raise error_named(message["error"], message["message"], message["hint"])


def _read_before(descriptor: int, deadline: float) -> bytes:
    readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
    if not readable:
        raise TimeoutError
    return os.read(descriptor, 64 << 10)


def _end(descriptor: int, received: bytes) -> None:
    """Have the process end whose start is given up; it unmounts. It may not have said yet which one it is."""
    deadline = time.monotonic() + _PATIENCE
    try:
        while b"\n" not in received and (piece := _read_before(descriptor, deadline)):
            received += piece
    except TimeoutError:
        return
    line = received.partition(b"\n")[0]
    if line:
        try:
            os.kill(json.loads(line)["pid"], signal.SIGTERM)
        except ProcessLookupError:
            return
