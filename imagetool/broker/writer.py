"""Many requests' transactions in one: each waits for one commit, and one commit serves all that wait.

With a database that writes to a disk before it answers, this is what makes the broker's rate more than the disk's.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection

from encfs.errors import StorageError
from imagetool.broker.database import Database

T = TypeVar("T")
#: Most operations in one transaction.
_BATCH = 64
#: Seconds after which a request gives up; longer than the database waits for a lock.
TIMEOUT = 15.0
_QUEUE = 1024


@dataclass(frozen=True, slots=True)
class _Job:
    operation: Callable[[Connection], Any]
    durable: bool
    loop: asyncio.AbstractEventLoop
    outcome: asyncio.Future[Any]


#: A job, its value, and why it has none.
_Outcome = tuple[_Job, Any, BaseException | None]


def too_late() -> StorageError:
    return StorageError("the broker's database does not answer in time", hint="try again")


class Writer:
    """A thread that writes. An operation gets the connection, returns a value, and may be run a second time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="broker-writer", daemon=True)
        self._thread.start()

    async def run(self, operation: Callable[[Connection], T], *, durable: bool = False) -> T:
        """The operation's value, once it is committed.

        Raises: what the operation raises, nothing of it being written then; StorageError where the database cannot be
        used, or did not answer in time: it is then unknown whether it was written.
        """
        if self._jobs.qsize() >= _QUEUE:
            raise too_late()
        loop = asyncio.get_running_loop()
        job = _Job(operation, durable, loop, loop.create_future())
        self._jobs.put(job)
        try:
            async with asyncio.timeout(TIMEOUT):
                outcome: T = await job.outcome
        except TimeoutError:
            raise too_late() from None
        return outcome

    def close(self) -> None:
        """Finish what is waiting, and end the thread. Not for the event loop's thread."""
        self._jobs.put(None)
        self._thread.join(2 * TIMEOUT)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch = [job]
            ended = False
            while len(batch) < _BATCH and not ended:
                try:
                    another = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if another is None:
                    ended = True
                else:
                    batch.append(another)
            _hand_back(self._committed(batch))
            if ended:
                return

    def _committed(self, batch: list[_Job]) -> list[_Outcome]:
        try:
            with self._database.transaction(durable=any(job.durable for job in batch)) as connection:
                values = [job.operation(connection) for job in batch]
        except BaseException as error:  # noqa: BLE001 -- handed to whoever waits
            if len(batch) == 1 or isinstance(error, StorageError):
                return [(job, None, error) for job in batch]
            # One of them failed and took the others along: each by itself then.
            return [outcome for job in batch for outcome in self._committed([job])]
        return [(job, value, None) for job, value in zip(batch, values, strict=True)]


def _hand_back(outcomes: list[_Outcome]) -> None:
    """Wake each loop once for all that it waits for."""
    for loop in {job.loop for job, _, _ in outcomes}:
        mine = [one for one in outcomes if one[0].loop is loop]
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, mine)


def _settle(outcomes: list[_Outcome]) -> None:
    for job, value, error in outcomes:
        if job.outcome.done():  # nobody waits any more
            continue
        if error is not None:
            job.outcome.set_exception(error)
        else:
            job.outcome.set_result(value)
