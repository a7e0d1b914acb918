"""`sealed:FILE`: a key that `encfs seal --snp` or `--gramine` sealed under one that this guest or enclave derives.

Nothing is kept: the firmware is asked anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence

from encfs.attestation.collect import sev_guest
from encfs.attestation.collect.sources import THIS_MACHINE
from encfs.errors import KeyFileError, KeyRefusedError
from encfs.keys.providers.gramine import GramineProvider
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey


class SealedProvider:
    """Unwraps with the key that is sealed in a file."""

    def __init__(self, path: str) -> None:
        if not path:
            raise KeyFileError("the key URI sealed: names no file", hint="write sealed:FILE; encfs seal makes one")
        self._path = path

    @staticmethod
    def unavailable() -> str | None:
        problems = (sev_guest.device_problem(THIS_MACHINE.sev_guest), GramineProvider.unavailable())
        return None if None in problems else "; ".join(filter(None, problems))

    @property
    def uri(self) -> str:
        return f"sealed:{self._path}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        key = self.fetch()
        try:
            return unwrap_with_key(key, recipients, content_digest, self.uri)
        finally:
            key.wipe()

    def fetch(self) -> SymmetricKey:
        """The key, a copy that the caller wipes. Raises: as `encfs.keys.sealedfile.load_sealed` and `unseal_under`."""
        from encfs.keys.sealedfile import load_sealed, unseal_under

        found = load_sealed(self._path)
        try:
            return unseal_under(found)
        except KeyRefusedError as error:
            raise KeyRefusedError(f"{self._path}: {error.message}", hint=error.hint) from None

    def close(self) -> None:
        return
