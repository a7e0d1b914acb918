"""How long to keep trying, and how long to wait in between. Knows nothing of HTTP."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from encfs.errors import EncfsError, TransportError

#: First and longest pause between two attempts (seconds); each is drawn between nothing and twice the one before.
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 10.0
#: Attempts as long as nothing was ever heard from the other side: a wrong name shall not take a minute to fail.
_FIRST_CONTACT_ATTEMPTS = 4


class Patience:
    """The time budget of one operation, spent by attempts and pauses. Belongs to one thread."""

    def __init__(
        self,
        seconds: float,
        *,
        attempts: int | None = None,
        stopped: threading.Event | None = None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`attempts`: at most so many without progress; `stopped` ends every pause with a TransportError."""
        self._seconds = seconds
        self._attempts = attempts
        self._stopped = stopped or threading.Event()
        self._jitter = jitter
        self._deadline = time.monotonic() + seconds
        self._failures = 0
        #: Seconds that the other side asked to wait after the last failure.
        self.asked_to_wait = 0.0

    @property
    def remaining(self) -> float:
        """Seconds left; never negative."""
        return max(0.0, self._deadline - time.monotonic())

    def renew(self) -> None:
        """Something was achieved: the budget begins anew."""
        self.extend()
        self.forget_failures()

    def forget_failures(self) -> None:
        """Something, however little, was achieved since the last failure; the time goes on running."""
        self._failures = 0

    def extend(self) -> None:
        """Something is under way: the time begins anew, the count of failures does not."""
        self._deadline = time.monotonic() + self._seconds

    def pause(self, error: EncfsError, *, at_least: float = 0.0, first_contact: bool = False) -> None:
        """Wait before the next attempt after `error`, at least `at_least` seconds; raise `error` if it is too late.

        The first retry comes at once unless `at_least` says otherwise: most often a kept connection had gone stale.
        """
        if self._stopped.is_set():
            raise TransportError("the store was closed while it was being read") from error
        self.asked_to_wait = at_least
        self._failures += 1
        limit = min(self._attempts or 1_000_000, _FIRST_CONTACT_ATTEMPTS if first_contact else 1_000_000)
        if self._failures >= limit:
            raise error
        seconds = 0.0
        if self._failures > 1 or first_contact:
            seconds = self._jitter(0.0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0**self._failures))
        seconds = max(seconds, at_least)
        if seconds >= self.remaining:
            raise error
        if self._stopped.wait(seconds):
            raise TransportError("the store was closed while it was being read") from error
