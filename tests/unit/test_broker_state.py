"""What the broker keeps: sealed, authenticated, in one chain. Attacks by someone who can write to the database."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, delete, func, insert, select, text, update

from encfs.errors import ConflictError, EncfsError, FormatError, IntegrityError, NotFoundError, RollbackError
from encfs.keys.secrets import SymmetricKey
from imagetool.broker import log, state
from imagetool.broker.database import Database, parse_url
from imagetool.broker.limits import ByteBudget, RateLimiter, network
from imagetool.broker.policy import parse_policy
from imagetool.broker.tables import DECISIONS, METADATA, RESOURCES, STATE
from imagetool.broker.vault import Vault
from imagetool.broker.writer import Writer
from tests.support.postgres import Postgres, running_postgres

KEK = SymmetricKey(bytearray(range(32)))
A, B = "default/key/a", "default/key/b"
RULES = '[key."default/key/a"]\ntee = "sample"\n[key."default/key/b"]\ntee = "sample"\n'


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    kind: str = request.param
    url = request.getfixturevalue("postgres").database() if kind == "postgresql" else "sqlite"
    found = Database(parse_url(url, tmp_path))
    found.migrate()
    yield found
    found.close()


@pytest.fixture
def vault(database: Database) -> Vault:
    """A database with two keys under two rules."""
    with database.transaction() as connection:
        vault = Vault(KEK, state.create_state(connection))
        state.store_initial(connection, vault)
        state.set_policy(connection, vault, RULES)
        state.add_key(connection, vault, A, state.KEY, b"a" * 32, 1)
        state.add_key(connection, vault, B, state.KEY, b"b" * 32, 1)
    return vault


def read(database: Database, vault: Vault, path: str) -> bytes:
    with database.transaction() as connection:
        return bytes(state.open_key(connection, vault, state.load_state(connection, vault), path))


def test_migrations_make_the_schema(database: Database) -> None:
    database.migrate()
    with database.reading() as connection:
        for table in METADATA.tables.values():
            assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []


def test_keys_come_back_and_floors_stay(database: Database, vault: Vault) -> None:
    assert read(database, vault, A) == b"a" * 32
    with database.transaction() as connection:
        after = state.raise_floor(connection, vault, A, "acme/a", 4)
    assert after.entries[A].min_version == 4
    assert read(database, vault, A) == b"a" * 32
    with database.transaction() as connection, pytest.raises(RollbackError, match="below the floor 4"):
        state.raise_floor(connection, vault, A, "acme/a", 3)
    with database.transaction() as connection, pytest.raises(ConflictError, match="not for 'acme/x'"):
        state.raise_floor(connection, vault, A, "acme/x", 9)
    with database.transaction() as connection, pytest.raises(ConflictError, match="already"):
        state.add_key(connection, vault, A, state.KEY, b"x" * 32, 1)
    with database.transaction() as connection, pytest.raises(NotFoundError):
        state.remove_key(connection, vault, "default/key/c")
    with database.transaction() as connection:
        state.remove_key(connection, vault, A)
    with pytest.raises(NotFoundError):
        read(database, vault, A)
    assert read(database, vault, B) == b"b" * 32


def test_a_policy_seals_anew_only_what_it_changes(database: Database, vault: Vault) -> None:
    with database.transaction() as connection:
        after, moved = state.set_policy(connection, vault, RULES + "releases = 3\n")
    assert moved == [B]
    assert after.entries[A].revision < after.entries[B].revision
    assert read(database, vault, A) == b"a" * 32
    assert read(database, vault, B) == b"b" * 32


def test_nothing_secret_is_in_the_database(database: Database, vault: Vault) -> None:
    with database.reading() as connection:
        for row in connection.execute(select(RESOURCES)):
            assert b"a" * 8 not in row.sealed
            assert b"b" * 8 not in row.sealed


def _swap(connection: Connection) -> None:
    rows = {row.path: row for row in connection.execute(select(RESOURCES))}
    for path, other in ((A, B), (B, A)):
        connection.execute(
            update(RESOURCES).where(RESOURCES.c.path == path).values(sealed=rows[other].sealed, nonce=rows[other].nonce)
        )


def _lax_policy(connection: Connection) -> None:
    connection.execute(update(STATE).values(policy='[key."*"]\ntee = "snp"\nany_workload = true\n'))


def _no_floor(connection: Connection) -> None:
    connection.execute(update(RESOURCES).where(RESOURCES.c.path == A).values(min_version=0, artifact_id="acme/a"))


def _another_path(connection: Connection) -> None:
    connection.execute(update(RESOURCES).where(RESOURCES.c.path == A).values(path="default/key/z"))


def _dropped(connection: Connection) -> None:
    connection.execute(delete(RESOURCES).where(RESOURCES.c.path == A))


def _as_opaque(connection: Connection) -> None:
    connection.execute(update(RESOURCES).where(RESOURCES.c.path == A).values(kind="opaque"))


def _older_epoch(connection: Connection) -> None:
    connection.execute(update(STATE).values(epoch=1))


@pytest.mark.parametrize(
    "attack",
    [_swap, _lax_policy, _no_floor, _another_path, _dropped, _as_opaque, _older_epoch],
    ids=lambda one: one.__name__,
)
def test_who_writes_to_the_database_gets_no_key(
    database: Database, vault: Vault, attack: Callable[[Connection], None]
) -> None:
    with database.transaction() as connection:
        attack(connection)
    with pytest.raises(IntegrityError):
        read(database, vault, A)


def test_one_old_row_put_back_does_not_open(database: Database, vault: Vault) -> None:
    with database.reading() as connection:
        old = connection.execute(select(RESOURCES).where(RESOURCES.c.path == A)).one()
    with database.transaction() as connection:
        state.raise_floor(connection, vault, A, "acme/a", 4)
    with database.transaction() as connection:
        connection.execute(delete(RESOURCES).where(RESOURCES.c.path == A))
        connection.execute(insert(RESOURCES).values(**old._mapping))
    with pytest.raises(IntegrityError):
        read(database, vault, A)


def test_another_kek_opens_nothing(database: Database, vault: Vault) -> None:
    with pytest.raises(IntegrityError):
        read(database, Vault(SymmetricKey(bytearray(32)), vault.database_id), A)


def test_another_databases_rows_do_not_open(database: Database, vault: Vault) -> None:
    with pytest.raises(IntegrityError):
        read(database, Vault(KEK, "0" * 32), A)


# The log


def _written(database: Database, vault: Vault, count: int = 5) -> log.LogHead:
    for number in range(count):
        with database.transaction() as connection:
            log.append(connection, vault, time=number, event="released", path=A, members={"n": number})
    with database.reading() as connection:
        return log.verify(connection, vault)


def test_the_chain_holds_and_grows(database: Database, vault: Vault) -> None:
    head = _written(database, vault)
    assert head.sequence == 5
    later = _written(database, vault, 3)
    with database.reading() as connection:
        assert log.verify(connection, vault, head) == later
        assert log.verify(connection, vault, log.parse_head(str(head))) == later
        assert [entry["sequence"] for entry in log.entries(connection, path=A, after=6)] == [7, 8]
        assert list(log.entries(connection, path=B)) == []


def _altered(connection: Connection) -> None:
    row = connection.execute(select(DECISIONS).where(DECISIONS.c.sequence == 3)).one()
    entry = json.dumps(json.loads(row.entry) | {"n": 9})
    connection.execute(update(DECISIONS).where(DECISIONS.c.sequence == 3).values(entry=entry))


def _removed(connection: Connection) -> None:
    connection.execute(delete(DECISIONS).where(DECISIONS.c.sequence == 3))


def _hidden(connection: Connection) -> None:
    connection.execute(update(DECISIONS).where(DECISIONS.c.sequence == 3).values(released=0))


def _rewritten(connection: Connection) -> None:
    """A chain that is right in itself, written by somebody without the KEK."""
    forger = Vault(SymmetricKey(bytearray(32)), "0" * 32)
    connection.execute(delete(DECISIONS).where(DECISIONS.c.sequence > 2))
    log.append(connection, forger, time=0, event="refused", path=A, members={})


@pytest.mark.parametrize("attack", [_altered, _removed, _hidden, _rewritten], ids=lambda one: one.__name__)
def test_a_log_that_was_changed_is_seen(database: Database, vault: Vault, attack: Callable[[Connection], None]) -> None:
    _written(database, vault)
    with database.transaction() as connection:
        attack(connection)
    with database.reading() as connection, pytest.raises(IntegrityError, match="entry 3 is missing or altered"):
        log.verify(connection, vault)


def test_an_end_that_was_cut_off_is_seen_by_who_kept_a_head(database: Database, vault: Vault) -> None:
    head = _written(database, vault)
    with database.transaction() as connection:
        connection.execute(delete(DECISIONS).where(DECISIONS.c.sequence > 3))
    with database.reading() as connection:
        assert log.verify(connection, vault).sequence == 3
        with pytest.raises(IntegrityError, match="cut off"):
            log.verify(connection, vault, head)


def test_a_policy_that_is_not_accepted_any_more_can_be_replaced(database: Database, vault: Vault) -> None:
    lax = '[key."default/key/*"]\ntee = "snp"\nhost_data = "' + "00" * 32 + '"'
    with database.transaction() as connection:
        before = state.load_state(connection, vault)
        earlier = replace(before, policy_text=lax, policy=parse_policy(lax, judged=False), entries={})
        connection.execute(delete(RESOURCES))
        state._store(connection, vault, earlier)
    with database.transaction() as connection, pytest.raises(FormatError, match="accepts any software"):
        state.load_state(connection, vault)
    with database.transaction() as connection:
        state.set_policy(connection, vault, RULES)
        assert state.load_state(connection, vault).policy_text == RULES
        with pytest.raises(FormatError):
            state.set_policy(connection, vault, lax)


def test_an_end_beyond_the_owners_last_change_is_seen_by_itself(database: Database, vault: Vault) -> None:
    with database.transaction() as connection:
        for number, event in enumerate(("init", "policy-set", "key-added"), start=1):
            log.append(connection, vault, time=0, event=event, path="", members={"epoch": number})
        log.append(connection, vault, time=0, event="refused", path=A, members={"epoch": 9})
    with database.reading() as connection:
        assert log.verify(connection, vault, epoch=3).sequence == 4
    for kept, epoch in ((3, 3), (2, 2), (0, 0)):
        with database.transaction() as connection:
            connection.execute(delete(DECISIONS).where(DECISIONS.c.sequence > kept))
        with database.reading() as connection:
            assert log.verify(connection, vault, epoch=epoch).sequence == kept
            with pytest.raises(IntegrityError, match=f"epoch {epoch + 1}"):
                log.verify(connection, vault, epoch=epoch + 1)


# The database


def test_one_failing_operation_does_not_take_others_along(database: Database, vault: Vault) -> None:
    writer = Writer(database)
    try:

        def fail(_connection: Connection) -> None:
            raise NotFoundError("this one")

        def append(connection: Connection) -> int:
            return log.append(connection, vault, time=0, event="x", path="", members={})

        async def many() -> list[int | BaseException | None]:
            good = [writer.run(append) for _ in range(20)]
            bad = [writer.run(fail) for _ in range(5)]
            return await asyncio.gather(*good, *bad, return_exceptions=True)

        outcomes = asyncio.run(many())
        assert sorted(one for one in outcomes if isinstance(one, int)) == list(range(1, 21))
        assert [str(one) for one in outcomes[20:]] == ["this one"] * 5
    finally:
        writer.close()
    with database.reading() as connection:
        assert log.verify(connection, vault).sequence == 20


def test_errors_of_the_database_are_one_line(database: Database, vault: Vault) -> None:
    with pytest.raises(EncfsError) as caught, database.transaction() as connection:
        connection.execute(text("SELECT nothing FROM nowhere"))
    assert "\n" not in str(caught.value)
    assert read(database, vault, A) == b"a" * 32


def test_rates_are_per_address_and_bounded() -> None:
    now = [0.0]
    limiter = RateLimiter(2, 3, clock=lambda: now[0])
    assert [limiter.allow("a") for _ in range(5)] == [True, True, True, False, False]
    assert limiter.allow("b")
    now[0] += 1
    assert [limiter.allow("a") for _ in range(3)] == [True, True, False]


def test_what_counts_as_one_address() -> None:
    assert network("192.0.2.1") == network("::ffff:192.0.2.1") == "192.0.2.1"
    assert network("2001:db8:1:2::1") == network("2001:db8:1:2:ffff::9") != network("2001:db8:1:3::1")
    assert network("fe80::1%eth0") == network("fe80::2%eth1")
    assert network("unknown") == "unknown"
    limiter = RateLimiter(1, 1, clock=lambda: 0)
    assert [limiter.allow(one) for one in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::")] == [True, False, True]


def test_bytes_cost_what_they_are() -> None:
    now = 0.0
    limiter = RateLimiter(10, 100, clock=lambda: now)
    assert [limiter.allow("a", cost) for cost in (60, 60, 40, 1)] == [True, False, True, False]
    now = 6.0
    assert [limiter.allow("a", cost) for cost in (61, 60)] == [False, True]


def test_bytes_under_way_are_shared() -> None:
    budget = ByteBudget(100)
    assert budget.take("a", 50)
    assert not budget.take("a", 1)
    assert budget.take("b", 30)
    assert budget.take("c", 20)
    assert not budget.take("d", 1)
    budget.give_back("a", 50)
    assert budget.take("d", 50)
    for name, size in (("b", 30), ("c", 20), ("d", 50)):
        budget.give_back(name, size)
    assert budget.take("a", 50)
