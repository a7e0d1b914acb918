"""What becomes of an error in a request: EIO for the caller, one line in the log, a counter.

Lines are limited: the same message once a minute, and a bounded number of lines per kind of error and minute; what was
left out is counted in the next line. Not here: which errno a well-behaved request gets (`filesystem`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from encfs.errors import EncfsError, IntegrityError

_PERIOD = 60.0
_LINES_PER_KIND = 10
_MESSAGES = 256

log = logging.getLogger("encfs.mount")


@dataclass(slots=True)
class _Kind:
    """Lines of one kind of error since `since` (seconds, monotonic)."""

    since: float
    lines: int = 0
    left_out: int = 0


class FailureLog:
    """Counts and logs failed requests. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self.last: EncfsError | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[type[BaseException], _Kind] = {}
        self._recent: OrderedDict[str, float] = OrderedDict()

    def record(self, error: Exception) -> None:
        """One request failed. What is no EncfsError is a bug, and logged with its traceback, which shows no values."""
        with self._lock:
            self.count += 1
            if isinstance(error, EncfsError):
                self.last = error
            left_out = self._admit(type(error), f"{type(error).__name__}: {error}")
        if left_out is None:
            return
        suffix = f" ({left_out} similar left out)" if left_out else ""
        if isinstance(error, EncfsError):
            audit = {"event": "integrity_failure", "error": type(error).__name__, "detail": error.message}
            extra = {"audit": audit} if isinstance(error, IntegrityError) else None
            log.error("%s: %s%s", type(error).__name__, error, suffix, extra=extra)
        else:
            log.error("unexpected error in a request%s", suffix, exc_info=error)

    def _admit(self, kind: type[BaseException], message: str) -> int | None:
        """Whether a line may be written: the number of lines left out before it, or None."""
        now = self._clock()
        state = self._kinds.setdefault(kind, _Kind(now))
        if now - state.since >= _PERIOD:
            state.since, state.lines = now, 0
        said = self._recent.get(message)
        if state.lines >= _LINES_PER_KIND or (said is not None and now - said < _PERIOD):
            state.left_out += 1
            return None
        self._recent[message] = now
        self._recent.move_to_end(message)
        while len(self._recent) > _MESSAGES:
            self._recent.popitem(last=False)
        state.lines += 1
        left_out, state.left_out = state.left_out, 0
        return left_out
