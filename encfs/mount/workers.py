"""Threads for requests that have to wait for disk or network, and the way back to the event loop.

trio's own threads cost about twice as much per call, which is most of a random read from a fast disk. Not here: what is
done in them (`reading`, `filesystem`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

import trio

from encfs.errors import StorageError

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job(Generic[T]):
    """One call. `task` is None once nobody waits any more; one of `result` and `error` is set when it is done."""

    function: Callable[..., T]
    arguments: tuple[object, ...]
    task: trio.lowlevel.Task | None
    result: T | None = None
    error: BaseException | None = None


class Workers:
    """At most `limit` threads, started as they are needed, for one event loop. They never keep the process alive."""

    def __init__(self, limit: int) -> None:
        self.busy = 0
        self._limit = limit
        self._threads = 0
        self._jobs: SimpleQueue[tuple[_Job[object], trio.lowlevel.TrioToken]] = SimpleQueue()

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call `function` in a thread; what it returns or raises. A cancelled call runs on, its outcome is dropped.

        Raises: StorageError where the system gives not even one thread; with fewer than wanted, the call waits longer.
        """
        if self.busy >= self._threads < self._limit:
            self._start_thread()
        job = _Job(function, arguments, trio.lowlevel.current_task())
        self.busy += 1
        self._jobs.put((cast("_Job[object]", job), trio.lowlevel.current_trio_token()))

        def abandon(_: object) -> trio.lowlevel.Abort:
            job.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abandon)
        if job.error is not None:
            raise job.error
        return cast("T", job.result)

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"encfs-wait-{self._threads + 1}", daemon=True).start()
        except RuntimeError as error:
            if not self._threads:
                raise StorageError(str(error), hint="raise the limit of processes and threads") from None
        else:
            self._threads += 1

    def _work(self) -> None:
        while True:
            job, token = self._jobs.get()
            try:
                job.result = job.function(*job.arguments)
            except BaseException as error:  # noqa: BLE001 - raised again where the call was made
                job.error = error
            try:
                token.run_sync_soon(self._deliver, job)
            except trio.RunFinishedError:
                return
            del job

    def _deliver(self, job: _Job[object]) -> None:
        """On the event loop."""
        self.busy -= 1
        if job.task is not None:
            trio.lowlevel.reschedule(job.task)
