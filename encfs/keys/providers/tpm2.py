"""`tpm2:FILE`: a key-encryption key that `encfs seal` sealed, or a private key that was made in the TPM.

The TPM gives the one back, and uses the other, while its policy is met.
Nothing is kept: the TPM is asked anew each time. The library for TPMs is loaded only then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from encfs.errors import KeyFileError
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey

if TYPE_CHECKING:
    from encfs.tpm.keyfile import TpmObject


class Tpm2Provider:
    """Unwraps with the key that is sealed in a file."""

    def __init__(self, path: str) -> None:
        if not path:
            raise KeyFileError("the key URI tpm2: names no file", hint="write tpm2:FILE; encfs seal makes one")
        self._path = path

    @staticmethod
    def unavailable() -> str | None:
        from encfs.tpm.availability import unavailable

        return unavailable()

    @property
    def uri(self) -> str:
        return f"tpm2:{self._path}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        from encfs.tpm.keyfile import load_object

        found = load_object(self._path)
        if found.kind == "key":
            return self._unwrap_in_tpm(found, recipients, content_digest)
        key = self._unsealed(found)
        try:
            return unwrap_with_key(key, recipients, content_digest, self.uri)
        finally:
            key.wipe()

    def fetch(self) -> SymmetricKey:
        """The key, a copy that the caller wipes. Raises: as `encfs.tpm.sealing.unseal` and `keyfile.load_object`."""
        from encfs.tpm.keyfile import load_object

        return self._unsealed(load_object(self._path))

    def _unwrap_in_tpm(self, found: TpmObject, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        from encfs.tpm.availability import require_library

        require_library()
        from encfs.tpm.resident import ResidentKey

        return unwrap_with_key(ResidentKey(found), recipients, content_digest, self.uri)

    def _unsealed(self, found: TpmObject) -> SymmetricKey:
        from encfs.tpm.availability import require_library

        if found.kind == "key":
            raise KeyFileError(
                f"{self._path} is a private key, which never leaves the TPM", hint="encrypt to its public half"
            )
        require_library()
        from encfs.tpm.sealing import unseal

        try:
            return unseal(found)
        except KeyFileError as error:
            raise KeyFileError(f"{self._path}: {error.message}", hint=error.hint) from None

    def close(self) -> None:
        return
