"""A daemon as its supervisor sees it: a process, the channel to it, and what it has said so far.

Not here: when one is started, and what follows from what it says (`supervisor`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from encfs.errors import EncfsError
from encfs.mount.protocol import MAX_ANSWER

#: The kernel's counters (proc(5)).
VMSTAT = Path("/proc/vmstat")


@dataclass(slots=True)
class DaemonProcess:
    """`watch` (a pidfd) and `channel` are owned. `prepared`: it waits for its predecessor's end. Times in seconds."""

    process: subprocess.Popen[bytes]
    watch: int
    channel: socket.socket
    started: float = field(default_factory=time.monotonic)
    memory_kills: int = field(default_factory=lambda: memory_kills())
    ready: bool = False
    negotiated: bool = False
    prepared: bool = False
    answers: list[Mapping[str, object]] = field(default_factory=list)
    error: EncfsError | None = None
    _received: bytes = b""

    def receive(self) -> Iterator[Mapping[str, object]]:
        """The messages that have come since the last time. What is none is passed over."""
        while True:
            try:
                piece = self.channel.recv(MAX_ANSWER)
            except OSError:
                return
            if not piece:
                return
            *lines, self._received = (self._received + piece).split(b"\n")
            if len(self._received) > MAX_ANSWER:
                self._received = b""
            for line in lines:
                with suppress(ValueError, RecursionError):
                    message = json.loads(line)
                    if isinstance(message, dict):
                        yield message

    def forget(self) -> None:
        """Once it has ended."""
        os.close(self.watch)
        self.channel.close()


def start(words: Sequence[str], directory: int) -> DaemonProcess:
    """Run a command with `--fuse-fd N` added to it, N being its end of the channel. Raises: OSError.

    `directory` is a descriptor of its working directory, which may have another name by now, or none.
    """
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    with ExitStack() as undo:
        undo.callback(ours.close)
        with theirs:
            process = subprocess.Popen(
                [*words, "--fuse-fd", str(number)],
                pass_fds=[number],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd=f"/proc/self/fd/{directory}",
            )
        undo.callback(process.kill)
        daemon = DaemonProcess(process, os.pidfd_open(process.pid), ours)
        undo.pop_all()
    return daemon


def memory_kills() -> int:
    """How many processes this kernel has killed because memory, or a control group's, ran out (`oom_kill`); or 0."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
