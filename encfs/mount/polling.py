"""Look for the next FUSE request for some microseconds before the event loop goes to sleep.

A caller that walks a tree sends its next request right after the answer to the last one. Going to sleep and being woken
costs more than such a request does; looking for it halves the time of a walk. Where requests have lately come later
(large sequential reads, a busy machine), looking only takes time from the caller, and is left until they come sooner
again. It needs a second CPU for the caller, and a private function of pyfuse3: where either is missing, everything
works as pyfuse3 made it.
"""

from __future__ import annotations

import fcntl
import inspect
import os
import select
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import pyfuse3
import trio

from encfs.mount.fusedevice import DEVICE_NUMBER

_SEAM = "_wait_fuse_readable"
#: Nanoseconds to look for a request before sleeping.
_LOOK = 50_000
#: Nanoseconds that sleeping and being woken take, about: they are no part of the time until a request came.
_WAKING = 40_000
#: Nanoseconds between requests, smoothed, up to which looking pays, and the most that one wait counts.
_PAYS = 40_000
_LONGEST = 400_000
#: Each wait counts for 1/8 of the smoothed time.
_SMOOTHING = 3
#: While looking does not pay, it is tried again every so many waits: how soon requests really come cannot be told from
#: waits that slept, since being woken may take longer than the request did.
_TRY_AGAIN = 16
#: Nanoseconds of uninterrupted requests after which everything else on the event loop gets its turn.
_TURN = 2_000_000
_DESCRIPTORS = Path("/proc/self/fd")

_Wait = Callable[[], Awaitable[bool]]


def fuse_descriptors() -> frozenset[int]:
    """This process's descriptors of /dev/fuse."""
    found = set()
    for name in os.listdir(_DESCRIPTORS):
        try:
            # A mount's own descriptor (fsmount(2)) is one of a path: to look at it is a request to this very process.
            if fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_PATH:
                continue
            status = os.fstat(int(name))
        except OSError:  # the listing's own descriptor
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == DEVICE_NUMBER:
            found.add(int(name))
    return frozenset(found)


class Idler(Protocol):
    """What can be done while nothing is asked for."""

    def may_look(self) -> bool:
        """False while worker threads are busy: looking would keep the interpreter's lock from them."""

    def work_ahead(self) -> bool:
        """Do some microseconds of work for what will be asked next; False where there is none."""


def install(descriptor: int, idler: Idler) -> Callable[[], None] | None:
    """Poll `descriptor`, the session's, from now on. Returns what undoes it; None where it cannot be done."""
    original = getattr(pyfuse3, _SEAM, None)
    if original is None or not _fits(original) or len(os.sched_getaffinity(0)) < 2:
        return None
    setattr(pyfuse3, _SEAM, _polling_wait(descriptor, idler, original))
    return lambda: setattr(pyfuse3, _SEAM, original)


def _fits(function: object) -> bool:
    """Whether it is what this module was written for: a coroutine function without parameters."""
    try:
        return inspect.iscoroutinefunction(function) and not inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _polling_wait(descriptor: int, idler: Idler, original: _Wait) -> _Wait:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    poll = poller.poll
    now = time.monotonic_ns
    turn_ends = 0
    smoothed = 0
    slept = 0

    async def wait_fuse_readable() -> bool:
        """True when a request can be received without blocking, False when the session has ended.

        Several of pyfuse3's tasks wait here. The one that returns receives without giving way to another, so that what
        `poll` saw is still there; whatever gives way looks again, since receiving blocks the whole event loop.
        """
        nonlocal turn_ends, smoothed, slept
        while True:
            ready = poll(0)
            while not ready and idler.work_ahead():
                ready = poll(0)
            started = time_now = now()
            trying = slept >= _TRY_AGAIN
            if (smoothed < _PAYS or trying) and idler.may_look():
                while not ready and time_now - started < _LOOK:
                    ready = poll(0)
                    time_now = now()
                slept = 0
            if ready:
                waited = time_now - started
                smoothed = waited if trying else smoothed + ((waited - smoothed) >> _SMOOTHING)
                if time_now < turn_ends:
                    return True
                await trio.lowlevel.checkpoint()
            else:
                slept += 1
                if not await original():
                    return False
                time_now = now()
                waited = min(max(0, time_now - started - _WAKING), _LONGEST)
                smoothed += (waited - smoothed) >> _SMOOTHING
            turn_ends = time_now + _TURN
            if poll(0):
                return True

    return wait_fuse_readable
