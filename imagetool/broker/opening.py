"""A broker's directory opened: configuration, database, the keys that come from its KEK. And making a new one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from encfs.errors import FormatError, NotFoundError
from encfs.keys.providers import fetched_key
from encfs.keys.secrets import SymmetricKey
from imagetool.broker import log, state
from imagetool.broker.config import CONFIG_FILE, BrokerConfig, read_config, write_config
from imagetool.broker.database import Database, create_sqlite_file, parse_url
from imagetool.broker.rollback import check_mark, new_mark
from imagetool.broker.state import State
from imagetool.broker.vault import Vault


@dataclass(frozen=True, slots=True)
class OpenedBroker:
    """To be closed with `database.close()`."""

    config: BrokerConfig
    database: Database
    vault: Vault

    def load_state(self) -> State:
        """The state, checked. Raises: as `state.load_state`."""
        with self.database.transaction(durable=False) as connection:
            return state.load_state(connection, self.vault)

    def check_mark(self) -> None:
        """Before a change by the owner: that it is not made to an old copy. Raises: RollbackError, KeyProviderError."""
        if self.config.mark is None:
            return
        with self.database.transaction(durable=False) as connection:
            current = state.load_state(connection, self.vault, judged=False)
        check_mark(self.config.mark, current.epoch)

    def settle(self, changed: State) -> None:
        """After a change by the owner: bring the mark up to the new epoch. Raises: KeyProviderError."""
        if self.config.mark is not None:
            check_mark(self.config.mark, changed.epoch)


def open_broker(directory: Path) -> OpenedBroker:
    """Raises: NotFoundError, FormatError, StorageError, what the KEK's provider raises."""
    config = read_config(directory)
    url = parse_url(config.database, config.directory)
    if url.get_backend_name() == "sqlite" and not Path(str(url.database)).is_file():
        raise NotFoundError(
            f"{url.database} does not exist", hint="restore it from a backup, or begin with a new directory"
        )
    database = Database(url)
    try:
        database.migrate()
        return OpenedBroker(config, database, _vault(config, _identity(database)))
    except BaseException:
        database.close()
        raise


def create_broker(config: BrokerConfig, counter_index: int | None) -> BrokerConfig:
    """Initialise the database and write `broker.toml`; the files that it names must be there.

    Raises: ConflictError where the directory or the database belongs to a broker; as `open_broker`.
    """
    url = parse_url(config.database, config.directory)
    if url.get_backend_name() == "sqlite":
        create_sqlite_file(url)
    database = Database(url)
    try:
        database.migrate()
        with database.transaction() as connection:
            vault = _vault(config, state.create_state(connection))
            made = state.store_initial(connection, vault)
            log.append(
                connection, vault, time=database.now(connection), event="init", path="", members={"epoch": made.epoch}
            )
            if counter_index is not None:
                mark = new_mark(counter_index, config.path(CONFIG_FILE))
                config = replace(config, counter_index=mark.index, counter_base=mark.base, counter_tpm=mark.tpm.hex())
            write_config(config)
    finally:
        database.close()
    return config


def _identity(database: Database) -> str:
    with database.reading() as connection:
        identity = state.database_id(connection)
    if identity is None:
        raise NotFoundError("the database was never initialised", hint="imagetool broker init makes a broker")
    if len(identity) != 32 or not set(identity) <= set("0123456789abcdef"):
        raise FormatError("the database's identity is malformed: it was altered")
    return identity


def _vault(config: BrokerConfig, identity: str) -> Vault:
    kek: SymmetricKey = fetched_key(config.kek_uri, bare=True)
    try:
        return Vault(kek, identity)
    finally:
        kek.wipe()
