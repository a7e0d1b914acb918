"""The highest epoch that this machine has seen, in an NV counter of its TPM: an old database is not served again.

The counter's value minus its value at `broker init` is the mark. It follows the database, never leads it: a crash in
between leaves the mark one behind, and the next start brings it up. One process at a time moves it, and only in the TPM
of `broker init`: a counter that is gone, or of another TPM, says nothing. Without a TPM there is no mark: the threat
model says what that means.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from encfs.errors import IntegrityError, RollbackError

#: Most steps the mark is brought up at once; NV memory wears out and is slow.
_MAX_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class CounterMark:
    """`base` is the counter's value that stands for epoch 0, `tpm` the name of the TPM's storage root key.

    `lock` is a file that whoever looks at the mark locks.
    """

    index: int
    base: int
    tpm: bytes = field(repr=False)
    lock: Path


def new_mark(index: int, lock: Path) -> CounterMark:
    """The counter at an index, made where there is none, as the mark of a database of epoch 1.

    Raises: KeyProviderError, UnsupportedError where the TPM cannot be used.
    """
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.counter import current_limit
    from encfs.tpm.storage import opened_storage

    with opened_storage() as storage:
        return CounterMark(index, current_limit(storage, index).value - 1, storage.root_name, lock)


def check_mark(mark: CounterMark, epoch: int) -> None:
    """Compare an authenticated epoch with the mark, and bring the mark up to it.

    Raises: RollbackError where the database is older than what was seen; KeyProviderError where the counter is gone,
    KeyRefusedError for another TPM.
    """
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm import counter
    from encfs.tpm.storage import PERSISTENT_ROOT, opened_storage

    with _locked(mark.lock), opened_storage(mark.tpm, PERSISTENT_ROOT) as storage:
        seen = counter.value(storage, mark.index) - mark.base
        if epoch < seen:
            raise RollbackError(
                f"the broker's database is of epoch {epoch}, but this machine has seen {seen}: an old copy was put "
                "back",
                hint="restore the newest backup; floors and revocations since then would be lost",
            )
        if epoch - seen > _MAX_STEPS:
            raise IntegrityError(f"the TPM's counter is {epoch - seen} steps behind the database: another counter")
        for _ in range(epoch - seen):
            counter.advance(storage, mark.index)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone, over all processes: two that both found the mark behind would move it twice."""
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
