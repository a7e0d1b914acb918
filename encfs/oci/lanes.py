"""The connections of a store: at most so many requests at a time, those that somebody waits for first.

Knows nothing of what is requested. Read-ahead and background leave one connection free, so that a reader need not wait
for the end of theirs; and the background pauses altogether while readers wait.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from time import monotonic

from encfs.errors import TransportError, TransportTimeoutError

log = logging.getLogger(__name__)

#: Read-ahead that waits for a thread; what is further behind would come too late.
_MAX_QUEUED = 64
#: The longest that a request in the background is held up in the middle (seconds): servers drop silent readers.
_LONGEST_HOLD = 2.0


class Priority(IntEnum):
    """Whose requests go first."""

    FOREGROUND = 0
    AHEAD = 1
    BACKGROUND = 2


class Lanes:
    """Thread-safe. Threads for read-ahead are started when they are first needed, and never keep a process alive."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = limit
        self._waiting = [0] * len(Priority)
        self._readers = 0
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        self._threads = 0
        self._idle = 0
        self._here = threading.local()
        #: False: nothing is read ahead, and no thread is started.
        self.read_ahead = True
        self.closed = False

    @contextmanager
    def lane(self, priority: Priority) -> Iterator[None]:
        """Room for one request. Raises: TransportError when it is closed."""
        self.enter(priority)
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Give back what `enter` gave."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def enter(self, priority: Priority, seconds: float | None = None) -> None:
        """Take room for one request. Raises: TransportTimeoutError after `seconds`, TransportError when closed."""
        deadline = None if seconds is None else monotonic() + seconds
        with self._changed:
            self._waiting[priority] += 1
            try:
                while not self._may_enter(priority):
                    self._wait(deadline)
                self._free -= 1
            finally:
                self._waiting[priority] -= 1
                self._changed.notify_all()

    def _may_enter(self, priority: Priority) -> bool:
        if self.closed:
            raise TransportError("the store was closed while it was being read")
        reserve = 1 if priority is not Priority.FOREGROUND and self._limit > 1 else 0
        if priority is Priority.BACKGROUND and self._readers:
            return False
        return self._free > reserve and not any(self._waiting[:priority])

    def _wait(self, deadline: float | None) -> None:
        rest = None if deadline is None else deadline - monotonic()
        if rest is not None and rest <= 0:
            raise TransportTimeoutError("all connections to the registry are busy and give no answer in time")
        self._changed.wait(rest)

    @contextmanager
    def reader_waits(self) -> Iterator[None]:
        """While somebody waits for the network, the background does not use it."""
        with self._changed:
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def hold_background(self) -> None:
        """Called in the middle of a request in the background: give way to readers, for a bounded time."""
        deadline = monotonic() + _LONGEST_HOLD
        with self._changed:
            while self._readers and not self.closed and (rest := deadline - monotonic()) > 0:
                self._changed.wait(rest)

    @property
    def reader_is_waiting(self) -> bool:
        """Whether the background has to pause."""
        return bool(self._readers)

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """What this thread reads says nothing of what will be read next."""
        self._here.background = True
        try:
            yield
        finally:
            self._here.background = False

    @property
    def follows(self) -> bool:
        """Whether what this thread reads is worth reading ahead of."""
        return self.read_ahead and not getattr(self._here, "background", False)

    def submit(self, task: Callable[[], None]) -> bool:
        """Have a thread do it, soon. False where there is too much to do already, or no thread; never waits."""
        with self._changed:
            if not self.read_ahead or self.closed or len(self._tasks) >= _MAX_QUEUED:
                return False
            if self._idle <= len(self._tasks) and self._threads < self._limit:
                self._threads += _start(self._work, f"encfs-ahead-{self._threads + 1}")
            if not self._threads:
                return False
            self._tasks.append(task)
            self._changed.notify_all()
        return True

    def spawn(self, task: Callable[[], None]) -> bool:
        """Have a thread of its own do what takes long and is waited for. False where there is none, or not yet."""
        with self._changed:
            if not self.read_ahead or self.closed:
                return False
        return _start(task, "encfs-whole")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                while not self._tasks and not self.closed:
                    self._changed.wait()
                self._idle -= 1
                if self.closed:
                    self._threads -= 1
                    self._changed.notify_all()
                    return
                task = self._tasks.popleft()
            try:
                task()
            except TransportError as error:
                log.debug("read-ahead: %s", error.message)
            except Exception:
                log.exception("unexpected error while reading ahead")
            del task

    def close(self, seconds: float = 2.0) -> None:
        """End the threads; one that still hangs on a connection after `seconds` is left to end by itself."""
        deadline = monotonic() + seconds
        with self._changed:
            self.closed = True
            self._tasks.clear()
            self._changed.notify_all()
            while self._threads and (rest := deadline - monotonic()) > 0:
                self._changed.wait(rest)


def _start(function: Callable[[], None], name: str) -> bool:
    """False where the system's limit of threads is reached: the reader then does without."""
    try:
        threading.Thread(target=function, name=name, daemon=True).start()
    except RuntimeError as error:
        log.debug("%s: %s", name, error)
        return False
    return True
