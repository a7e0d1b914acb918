"""Refused evidence in the log: it grows by a bounded amount, and nothing is lost of how much it was."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, update

from imagetool.broker import log
from imagetool.broker.database import Database
from imagetool.broker.refusals import INTERVAL, MAX_OF_ADDRESS, MAX_OF_ALL, note, settle
from imagetool.broker.tables import REFUSALS
from imagetool.broker.vault import Vault
from tests.unit.test_broker_state import database, postgres, vault

__all__ = ["database", "postgres", "vault"]

NOON = 500_000 * INTERVAL


def refuse(
    database: Database, vault: Vault, *, times: int, now: int = NOON, client: str = "192.0.2.1", code: str = "chain"
) -> None:
    with database.transaction() as connection:
        for _ in range(times):
            reasons = [{"code": code, "message": "why"}, {"code": "report-data", "message": "other"}]
            note(connection, vault, now=now, client=client, tee="snp", reasons=reasons, members={"session": "ab" * 8})


def settled(database: Database, vault: Vault, now: int) -> None:
    with database.transaction() as connection:
        settle(connection, vault, now)


def logged(database: Database, vault: Vault) -> tuple[int, list[dict[str, object]]]:
    """How many refusals have an entry each, and the entries of those that have none; the chain holds."""
    with database.reading() as connection:
        log.verify(connection, vault)
        found = list(log.entries(connection))
    return (
        sum(one["event"] == "refused-evidence" for one in found),
        [one for one in found if one["event"] == "refused-evidence-counted"],
    )


def rows(database: Database) -> int:
    with database.reading() as connection:
        return int(connection.execute(select(func.count()).select_from(REFUSALS)).scalar_one())


def test_of_one_address(database: Database, vault: Vault) -> None:
    refuse(database, vault, times=MAX_OF_ADDRESS)
    assert logged(database, vault) == (MAX_OF_ADDRESS, [])
    refuse(database, vault, times=500)
    refuse(database, vault, times=40, code="debug")
    # The numbers are an entry when the hour is over, and no sooner.
    settled(database, vault, NOON + INTERVAL - 1)
    assert logged(database, vault) == (MAX_OF_ADDRESS, [])
    # Another one still has its entries, with all that was found.
    refuse(database, vault, times=1, client="192.0.2.2")
    assert logged(database, vault)[0] == MAX_OF_ADDRESS + 1
    settled(database, vault, NOON + INTERVAL)
    details, (counted,) = logged(database, vault)
    assert details == MAX_OF_ADDRESS + 1
    assert (counted["from"], counted["until"], counted["time"]) == (NOON, NOON + INTERVAL, NOON + INTERVAL)
    assert counted["counts"] == [
        {"tee": "snp", "code": "chain", "count": 500},
        {"tee": "snp", "code": "debug", "count": 40},
    ]
    assert rows(database) == 0
    # Once; and the next hour begins anew.
    settled(database, vault, NOON + INTERVAL)
    refuse(database, vault, times=1, now=NOON + INTERVAL)
    settled(database, vault, NOON + 2 * INTERVAL)
    assert (logged(database, vault)[0], len(logged(database, vault)[1])) == (MAX_OF_ADDRESS + 2, 1)


def test_of_many_addresses(database: Database, vault: Vault) -> None:
    """A hostile network: entries, rows and what an hour leaves behind have bounds."""
    for number in range(MAX_OF_ALL + 50):
        refuse(database, vault, times=1, client=f"2001:db8:0:{number:x}::1", code=("chain", "debug")[number % 2])
    assert logged(database, vault)[0] == MAX_OF_ALL
    assert rows(database) == MAX_OF_ALL + 2
    # One /64 is one address.
    settled(database, vault, NOON + INTERVAL)
    for number in range(MAX_OF_ADDRESS + 9):
        refuse(database, vault, times=1, now=NOON + INTERVAL, client=f"2001:db8::{number:x}")
    settled(database, vault, NOON + 3 * INTERVAL)
    details, counted = logged(database, vault)
    assert details == MAX_OF_ALL + MAX_OF_ADDRESS
    assert [sum(part["count"] for part in one["counts"]) for one in counted] == [50, 9]  # type: ignore[attr-defined]


def test_what_was_counted_while_nobody_looked(database: Database, vault: Vault) -> None:
    """Brokers that were off for hours: each hour has its entry, oldest first."""
    for hour in (2, 0, 1):
        refuse(database, vault, times=MAX_OF_ADDRESS + 1 + hour, now=NOON + hour * INTERVAL)
    settled(database, vault, NOON + 9 * INTERVAL)
    _, counted = logged(database, vault)
    assert [one["from"] for one in counted] == [NOON, NOON + INTERVAL, NOON + 2 * INTERVAL]
    assert [one["counts"][0]["count"] for one in counted] == [1, 2, 3]  # type: ignore[index]


def test_a_transaction_that_fails_counts_nothing(database: Database, vault: Vault) -> None:
    reasons = [{"code": "chain", "message": "why"}]

    def fail() -> None:
        with database.transaction() as connection:
            note(connection, vault, now=NOON, client="192.0.2.1", tee="snp", reasons=reasons, members={})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert rows(database) == 0
    assert logged(database, vault) == (0, [])


def test_rows_that_somebody_wrote_end_nothing(database: Database, vault: Vault) -> None:
    refuse(database, vault, times=MAX_OF_ADDRESS + 1)
    with database.transaction() as connection:
        connection.execute(update(REFUSALS).where(REFUSALS.c.kind == "reason").values(name="one two three"))
    settled(database, vault, NOON + INTERVAL)
    assert logged(database, vault)[1][0]["counts"] == [{"tee": "one", "code": "two three", "count": 1}]
