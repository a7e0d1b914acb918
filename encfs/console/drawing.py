"""Drawing of progress on a terminal: implementations of `encfs.progress.Progress`.

Nothing is drawn for what takes less than a second. Rich is imported only once a bar is really drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from encfs.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

#: Seconds that a phase runs before anything of it is drawn.
DRAW_AFTER = 1.0
#: Seconds between two lines of `PlainProgress`.
LINE_INTERVAL = 5.0
#: Seconds between two redraws of `FancyProgress`.
REDRAW_INTERVAL = 0.1


class Phase:
    """How far one phase has come."""

    def __init__(self, label: str, total: int | None, now: float) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self.started = now

    def describe(self, now: float) -> str:
        """`1.2 GiB of 4 GiB (30 %), 512 MiB/s, 6 s left`, without what is not known."""
        elapsed = now - self.started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        text = format_size(self.done)
        if self.total:
            text += f" of {format_size(self.total)} ({min(self.done, self.total) * 100 // self.total} %)"
        if rate:
            text += f", {format_size(int(rate))}/s"
            if self.total and self.done < self.total:
                text += f", {format_duration((self.total - self.done) / rate)} left"
        return text

    def summary(self, now: float) -> str:
        elapsed = now - self.started
        rate = self.done / elapsed if elapsed > 0 else 0.0
        return f"{format_size(self.done)} in {format_duration(elapsed)}, {format_size(int(rate))}/s"


class PlainProgress:
    """A line now and then, for logs and dumb terminals; one more at the end of a phase that had any."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._phase: Phase | None = None
        self._next = 0.0
        self._drawn = False

    def begin(self, label: str, total: int | None) -> None:
        self.end()
        now = self._clock()
        self._phase = Phase(label, total, now)
        self._next = now + DRAW_AFTER
        self._drawn = False

    def advance(self, amount: int) -> None:
        phase = self._phase
        if phase is None:
            return
        phase.done += amount
        now = self._clock()
        if now >= self._next:
            self._write(f"{phase.label}: {phase.describe(now)}")
            self._next = now + LINE_INTERVAL
            self._drawn = True

    def end(self) -> None:
        if self._phase is not None and self._drawn:
            self._write(f"{self._phase.label}: {self._phase.summary(self._clock())}")
        self._phase = None

    def close(self) -> None:
        """Stop without a claim that the phase was finished."""
        self._phase = None


class FancyProgress:
    """A bar that is redrawn in place on standard error; it vanishes with its phase."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase: Phase | None = None
        self._next = 0.0
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def begin(self, label: str, total: int | None) -> None:
        self.end()
        now = self._clock()
        self._phase = Phase(label, total, now)
        self._next = now + DRAW_AFTER

    def advance(self, amount: int) -> None:
        phase = self._phase
        if phase is None:
            return
        phase.done += amount
        now = self._clock()
        if now >= self._next:
            self._draw(phase, now)
            self._next = now + REDRAW_INTERVAL

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._task = None
        self._phase = None

    close = end

    def print_above(self, text: str) -> bool:
        """Print a line so that the bar stays intact below it; False where no bar is drawn."""
        if self._bar is None:
            return False
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        return True

    def _draw(self, phase: Phase, now: float) -> None:
        if self._bar is None or self._task is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            # No refresh thread: drawing happens where the work reports, so nothing runs beside it.
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.start()
            self._task = self._bar.add_task(phase.label, total=phase.total, status="")
        self._bar.update(self._task, completed=phase.done, status=phase.describe(now))
        self._bar.refresh()
