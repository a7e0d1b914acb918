"""Many requests' transactions in one: each waits for one commit, and one commit serves all that wait.

With a database that writes to a disk before it answers, this is what makes the broker's rate more than the disk's.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sqlalchemy import Connection

from encfs.errors import StorageError
from imagetool.broker.database import Database

T = TypeVar("T")
#: Most operations in one transaction.
_BATCH = 64
#: Seconds after which a request gives up; longer than the database waits for a lock.
_TIMEOUT = 15.0
_QUEUE = 1024


@dataclass(frozen=True, slots=True)
class _Job:
    operation: Callable[[Connection], Any]
    durable: bool
    outcome: Future[Any] = field(default_factory=Future)


class Writer:
    """A thread that writes. An operation gets the connection, returns a value, and may be run a second time."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._work, name="broker-writer", daemon=True)
        self._thread.start()

    def run(self, operation: Callable[[Connection], T], *, durable: bool = False) -> T:
        """The operation's value, once it is committed.

        Raises: what the operation raises, nothing of it being written then; StorageError where the database cannot be
        used, or did not answer in time: it is then unknown whether it was written.
        """
        job = _Job(operation, durable)
        try:
            self._jobs.put(job, timeout=_TIMEOUT)
            outcome: T = job.outcome.result(_TIMEOUT)
        except (queue.Full, FutureTimeoutError):
            raise StorageError("the broker's database does not answer in time", hint="try again") from None
        return outcome

    def close(self) -> None:
        """Finish what is waiting, and end the thread."""
        self._jobs.put(None)
        self._thread.join(2 * _TIMEOUT)

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
            self._commit(batch)
            if ended:
                return

    def _commit(self, batch: list[_Job]) -> None:
        try:
            with self._database.transaction(durable=any(job.durable for job in batch)) as connection:
                values = [job.operation(connection) for job in batch]
        except BaseException as error:  # noqa: BLE001 -- handed to whoever waits
            if len(batch) == 1 or isinstance(error, StorageError):
                for job in batch:
                    job.outcome.set_exception(error)
            else:  # one of them failed and took the others along: each by itself then
                for job in batch:
                    self._commit([job])
        else:
            for job, value in zip(batch, values, strict=True):
                job.outcome.set_result(value)
