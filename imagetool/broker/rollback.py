"""The highest epoch that this machine has seen, in an NV counter of its TPM: an old database is not served again.

The counter's value minus its value at `broker init` is the mark. It follows the database, never leads it: a crash in
between leaves the mark one behind, and the next start brings it up. Without a TPM there is no mark: the threat model
says what that means.
"""

from __future__ import annotations

from dataclasses import dataclass

from encfs.errors import IntegrityError, RollbackError

#: Most steps the mark is brought up at once; NV memory wears out and is slow.
_MAX_STEPS = 10_000


@dataclass(frozen=True, slots=True)
class CounterMark:
    """`base` is the counter's value that stands for epoch 0."""

    index: int
    base: int


def new_mark(index: int) -> CounterMark:
    """The counter at an index, made where there is none, as the mark of a database of epoch 1.

    Raises: KeyProviderError, UnsupportedError where the TPM cannot be used.
    """
    return CounterMark(index, _value(index) - 1)


def check_mark(mark: CounterMark, epoch: int) -> None:
    """Compare an authenticated epoch with the mark, and bring the mark up to it.

    Raises: RollbackError where the database is older than what was seen; KeyProviderError.
    """
    seen = _value(mark.index) - mark.base
    if epoch < seen:
        raise RollbackError(
            f"the broker's database is of epoch {epoch}, but this machine has seen {seen}: an old copy was put back",
            hint="restore the newest backup; floors and revocations since then would be lost",
        )
    if epoch - seen > _MAX_STEPS:
        raise IntegrityError(f"the TPM's counter is {epoch - seen} steps behind the database: another TPM or counter")
    if epoch > seen:
        from encfs.tpm.counter import advance

        for _ in range(epoch - seen):
            advance(mark.index)


def _value(index: int) -> int:
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.counter import current_limit
    from encfs.tpm.storage import opened_storage

    with opened_storage() as storage:
        return current_limit(storage, index).value
