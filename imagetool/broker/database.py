"""The broker's database: SQLite by default, PostgreSQL by URL. Transactions, the clock, errors, migrations.

One writing transaction at a time, over all brokers that share a database: SQLite's `BEGIN IMMEDIATE`, an advisory lock
in PostgreSQL. That is what keeps the log one chain and the counts of releases right. What a transaction means is the
other modules' business; they use SQLAlchemy's core, no mapper.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from encfs.errors import StorageError, UnsupportedError, UsageError
from imagetool.broker import migrations

#: Seconds that a transaction waits for another one.
LOCK_TIMEOUT = 5.0
#: Seconds between attempts to begin a transaction of SQLite's.
_LOCK_PAUSE = 0.0005
_WAIT = f"PRAGMA busy_timeout = {int(LOCK_TIMEOUT * 1000)}"
_CONNECT_TIMEOUT = 5
#: Any number, the same in all brokers: what PostgreSQL's advisory lock is about ("encfs").
_LOCK_KEY = 0x656E636673
_READING = "encfs_reading"
_FOR_READING: Mapping[str, Any] = {"isolation_level": "AUTOCOMMIT", _READING: True}
_SQLITE_LOCKED = ("database is locked", "database table is locked")
_FULL = ("disk is full", "No space left", "could not extend file")


class Database:
    """One database; safe for several threads, not across a fork."""

    def __init__(self, url: URL) -> None:
        self.url = url
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._engine = _engine(url)
        self._reader = self._engine.execution_options(**_FOR_READING)
        self._unwaiting = _engine(url, wait=0).execution_options(**_FOR_READING) if self.is_sqlite else self._reader

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[Connection]:
        """A transaction that writes, the only one at this time. `durable`: on the disk once it is committed.

        One that is not durable can be lost where the power fails, and with it only what came after the last durable
        one; it is never half there.

        Raises: StorageError where the database is locked, full or away; nothing is written then.
        """
        with translated_database_errors(), self._engine.connect() as connection:
            if self.is_sqlite:
                # Outside of a transaction, and before it: SQLite ignores it inside of one.
                raw: Any = connection.connection.driver_connection
                raw.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with connection.begin():
                if not self.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
                    if not durable:
                        connection.execute(text("SET LOCAL synchronous_commit = off"))
                yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for single statements that only read; each sees what is committed. Raises: StorageError."""
        with translated_database_errors(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def reading_at_once(self) -> Iterator[Connection]:
        """As `reading`, of SQLite alone. Raises: StorageError instead of waiting where somebody locks the file."""
        with translated_database_errors(), self._unwaiting.connect() as connection:
            yield connection

    def now(self, connection: Connection) -> int:
        """Milliseconds since 1970 by the clock that all brokers of this database share."""
        if self.is_sqlite:
            return time.time_ns() // 1_000_000
        clock = text("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint")
        return int(connection.execute(clock).scalar_one())

    def migrate(self) -> None:
        """Bring the schema to this version's. Raises: StorageError; UnsupportedError where it is a later version's."""
        with self.reading() as connection:
            revision = _revision(connection)
        if revision == migrations.HEAD:
            return
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        with self.transaction() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError:
                raise UnsupportedError(
                    f"the database has the schema {revision}, of a later version of the broker",
                    hint="update this broker",
                ) from None

    def close(self) -> None:
        self._engine.dispose()
        self._unwaiting.dispose()


def parse_url(text_: str, directory: Path) -> URL:
    """The URL of a database: `sqlite` is `broker.db` in the broker's directory, else `postgresql://…`.

    Raises: UsageError; a password in it is not shown.
    """
    hint = "write sqlite, or postgresql://USER@HOST/DATABASE"
    if text_ == "sqlite":
        return URL.create("sqlite+pysqlite", database=str(directory / "broker.db"))
    try:
        url = make_url(text_)
    except (ArgumentError, ValueError):  # the latter for ports and addresses
        raise UsageError("the database's URL is malformed", hint=hint) from None
    if url.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise UsageError(f"databases of the kind {url.drivername[:32]!a} are not supported", hint=hint)
    return url.set(drivername="postgresql+psycopg")


@contextmanager
def translated_database_errors() -> Iterator[None]:
    """Turn the database's errors into a StorageError of one line, without statements and their parameters."""
    try:
        yield
    except DBAPIError as error:
        raise _translate(error) from None
    except SQLAlchemyError as error:
        raise StorageError(f"the broker's database cannot be used ({type(error).__name__})") from None


def _translate(error: DBAPIError) -> StorageError:
    said = str(error.orig).splitlines()[0][:200] if error.orig is not None and str(error.orig) else "no reason given"
    if any(one in said for one in _SQLITE_LOCKED) or "lock timeout" in said:
        return StorageError("the broker's database is locked", hint="another program keeps it: try again")
    if any(one in said for one in _FULL):
        return StorageError("the broker's database is full", hint="free some space where it lies")
    return StorageError(f"the broker's database cannot be used: {said}", hint="check its address, disk and permissions")


def _engine(url: URL, wait: float = LOCK_TIMEOUT) -> Engine:
    if url.get_backend_name() != "sqlite":
        try:
            return create_engine(
                url,
                pool_size=4,
                max_overflow=12,
                pool_timeout=LOCK_TIMEOUT,
                hide_parameters=True,
                connect_args={
                    "connect_timeout": _CONNECT_TIMEOUT,
                    # A host that vanished is noticed.
                    "keepalives_idle": 5,
                    "keepalives_interval": 2,
                    "keepalives_count": 3,
                    "tcp_user_timeout": 10_000,
                    "options": f"-c lock_timeout={int(LOCK_TIMEOUT * 1000)} -c statement_timeout=30000",
                },
            )
        except ImportError:
            raise UnsupportedError(
                "psycopg is not installed", hint="pip install 'encfs[broker]'; PostgreSQL needs it"
            ) from None
    engine = create_engine(
        url,
        pool_size=4,
        max_overflow=12,
        pool_timeout=LOCK_TIMEOUT,
        hide_parameters=True,
        connect_args={"timeout": wait, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # No transactions of the driver's own: `_begin_sqlite` begins them, so that none has to be upgraded to writing.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: Connection) -> None:
    """Begin to write as soon as nobody else does.

    SQLite itself would wait longer and longer between its attempts, up to a tenth of a second, where another worker
    needs a millisecond.
    """
    if connection.get_execution_options().get(_READING):
        return
    raw: Any = connection.connection.driver_connection
    deadline = time.monotonic() + LOCK_TIMEOUT
    raw.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                raw.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    # With its statement, as the library's own errors are.
                    raise OperationalError("BEGIN IMMEDIATE", None, error) from None
                time.sleep(_LOCK_PAUSE)
            else:
                return
    finally:
        raw.execute(_WAIT)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def create_sqlite_file(url: URL) -> None:
    """Make the file of a SQLite database, readable by its owner alone: SQLite itself would follow the umask."""
    os.close(os.open(str(url.database), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
