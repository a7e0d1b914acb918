"""The process that a container begins with: started early, since it takes about as long as opening the artifact does.

Not here: what it does (`init`), and serving it (`serve`, whose imports take a while).
"""

from __future__ import annotations

import socket
import subprocess
import sys
from types import TracebackType
from typing import Self

from encfs.errors import MountError

#: Seconds that it gets to end when it is not to be any more.
_PATIENCE = 5.0


class ContainerProcess:
    """A context manager: nothing of the container is left at the end. `channel` leads to it."""

    def __init__(self) -> None:
        """Raises: MountError where the system lets no process be started."""
        ours, theirs = socket.socketpair()
        self.channel = ours
        with theirs:
            words = [sys.executable, "-I", "-m", "encfs.container.init", str(theirs.fileno())]
            try:
                self._process = subprocess.Popen(words, env={}, pass_fds=[theirs.fileno()], close_fds=True)
            except OSError as error:
                ours.close()
                raise MountError(f"the container's process cannot be started: {error.strerror}") from None
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(_PATIENCE)

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end: its exit code, 128 + N after signal N."""
        code = self._process.wait()
        return code if code >= 0 else 128 - code
