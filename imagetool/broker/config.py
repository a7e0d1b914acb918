"""The broker's directory: `broker.toml` and what it names. Reading is strict; nothing is opened here.

| member | |
|---|---|
| `database` | `sqlite` (`broker.db` in the directory), or `postgresql://…` |
| `kek` | key URI of the key-encryption key; a relative file is in the directory |
| `certificate`, `private_key` | PEM files of the server; without them it serves without TLS only when asked to |
| `counter_index`, `counter_base`, `counter_tpm` | the NV counter that marks the highest epoch seen (`rollback.py`) |
| `endorsements` | a directory with VCEK and VLEK certificates, and Intel's collateral (`endorsements.py`) |
| `session_lifetime` | seconds, 300 by default |
| `max_sessions` | most sessions at one time, 100000 by default |
| `rate`, `burst` | requests that one address may make: each second in the long run, and at once; of each process |
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from encfs.errors import ConflictError, FormatError, NotFoundError
from encfs.keys.files import create_file
from encfs.strictjson import show_name
from imagetool.broker.rollback import CounterMark

CONFIG_FILE = "broker.toml"
#: Schemes of key URIs whose rest is a path.
FILE_SCHEMES = ("file", "tpm2", "sealed")
_MAX_SIZE = 64 << 10
_COUNTER = frozenset({"counter_index", "counter_base", "counter_tpm"})
_NAME = re.compile(r"[0-9a-f]{68}", re.ASCII)
_BOUNDS = {
    "counter_index": (0x01000000, 0x01FFFFFF),
    "counter_base": (0, 2**53 - 1),
    "session_lifetime": (5, 86400),
    "max_sessions": (10, 10_000_000),
    "rate": (1, 100_000),
    "burst": (1, 1_000_000),
}


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """What stands in `broker.toml`; paths in it are relative to `directory`."""

    directory: Path
    database: str = "sqlite"
    kek: str = "file:kek.jwk"
    certificate: str | None = None
    private_key: str | None = None
    counter_index: int | None = None
    counter_base: int | None = None
    counter_tpm: str | None = None
    endorsements: str | None = None
    session_lifetime: int = 300
    max_sessions: int = 100_000
    rate: int = 50
    burst: int = 200

    @property
    def mark(self) -> CounterMark | None:
        if self.counter_index is None or self.counter_base is None or self.counter_tpm is None:
            return None
        return CounterMark(
            self.counter_index, self.counter_base, bytes.fromhex(self.counter_tpm), self.path(CONFIG_FILE)
        )

    @property
    def kek_uri(self) -> str:
        """The key URI, with a relative path made absolute."""
        scheme, separator, rest = self.kek.partition(":")
        if not separator:
            scheme, rest = "file", self.kek
        return f"{scheme}:{self.directory / rest}" if scheme in FILE_SCHEMES else self.kek

    @property
    def endorsements_path(self) -> Path | None:
        return self.path(self.endorsements) if self.endorsements is not None else None

    def path(self, name: str) -> Path:
        return self.directory / name


def read_config(directory: Path) -> BrokerConfig:
    """Raises: NotFoundError, FormatError."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise NotFoundError(
            f"{directory} is no broker's directory", hint=f"make one: imagetool broker init {directory}"
        )
    with path.open("rb") as stream:
        content = stream.read(_MAX_SIZE + 1)
    if len(content) > _MAX_SIZE:
        raise FormatError(f"{path} is larger than {_MAX_SIZE} bytes")
    try:
        members = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise FormatError(f"{path} nests too deep") from None
    known = {one.name for one in fields(BrokerConfig)} - {"directory"}
    for name, value in members.items():
        if name not in known:
            raise FormatError(f"{path}: {show_name(name)} is not known", hint="docs/broker.md lists the members")
        _check(path, name, value)
    # One of them alone would be no mark, and nobody would notice.
    if 0 < len(members.keys() & _COUNTER) < len(_COUNTER):
        raise FormatError(f"{path}: {', '.join(sorted(_COUNTER))} belong together, as init writes them")
    return BrokerConfig(directory.absolute(), **members)


def write_config(config: BrokerConfig) -> Path:
    """Raises: ConflictError where there is one."""
    lines = [
        f"{one.name} = {json.dumps(value)}"
        for one in fields(BrokerConfig)
        if one.name != "directory" and (value := getattr(config, one.name)) is not None
    ]
    path = config.path(CONFIG_FILE)
    try:
        # It may hold a database's password.
        create_file(path, bytearray("\n".join([*lines, ""]).encode()), 0o600)
    except ConflictError:
        raise ConflictError(f"{config.directory} is a broker's directory already", hint="choose another") from None
    return path


def _check(path: Path, name: str, value: Any) -> None:
    if name in _BOUNDS:
        low, high = _BOUNDS[name]
        if type(value) is not int or not low <= value <= high:
            raise FormatError(f"{path}: {name} is not a number from {low} to {high}")
    elif not isinstance(value, str) or not value:
        raise FormatError(f"{path}: {name} is not text")
    elif name == "counter_tpm" and not _NAME.fullmatch(value):
        raise FormatError(f"{path}: {name} is not the name of a TPM's storage root key")
