"""Waiting for what is to happen, and not for seconds: those say nothing where a machine has more to do than it can."""

from __future__ import annotations

import fcntl
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: Seconds after which what did not happen is a failure. What is measured against it must be far quicker, or never end.
LONG = 60.0


def wait_until(
    condition: Callable[[], object], what: Callable[[], object] | None = None, seconds: float = LONG
) -> None:
    """Until a condition holds; `what` says how things are where it does not come to."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what() if what is not None else "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Alone with something that the whole machine has once, over all processes that run tests."""
    with open(Path(tempfile.gettempdir()) / f"encfs-test-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
