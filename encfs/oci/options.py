"""How stores are reached: TLS, mirrors, time limits, the ciphertext cache. Plain data for `encfs.oci.store`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

#: Seconds that one read may take, retries included, before it fails.
DEFAULT_IO_TIMEOUT = 60.0
#: Requests to a registry at the same time.
DEFAULT_CONCURRENCY = 4
#: Bytes of ciphertext kept on disk.
DEFAULT_CACHE_SIZE = 16 << 30


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Options of stores; an OCI layout needs none of them. Sizes in bytes, times in seconds."""

    #: PEM file of certificate authorities that are trusted besides the system's.
    ca_file: str | None = None
    #: PEM files of a client certificate and its key (mutual TLS); the key may be in `cert_file`.
    cert_file: str | None = None
    key_file: str | None = None
    #: Talk HTTP without TLS to the registry and to mirrors given without a scheme.
    plain_http: bool = False
    #: Registries tried before the one of the reference: `HOST[:PORT][/PREFIX]` or a URL of that.
    mirrors: tuple[str, ...] = ()
    io_timeout: float = DEFAULT_IO_TIMEOUT
    concurrency: int = DEFAULT_CONCURRENCY
    #: Directory of the ciphertext cache; None for no cache on disk.
    cache_dir: str | None = None
    cache_size: int = DEFAULT_CACHE_SIZE
    #: Directory for segments on their way to a registry; None: `TMPDIR`, or /var/tmp.
    spool_dir: str | None = None

    @property
    def spool(self) -> str:
        """The directory for large temporary files, all of them without a name."""
        return self.spool_dir or os.environ.get("TMPDIR") or "/var/tmp"  # noqa: S108 -- see above


def default_cache_dir() -> str:
    """`encfs` in the user's cache directory (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return str((Path(base) if base.startswith("/") else Path.home() / ".cache") / "encfs")
