"""`file:PATH`: a private or symmetric key in a JWK or PEM file, read anew each time and forgotten after use."""

from __future__ import annotations

from collections.abc import Sequence

from encfs.errors import KeyFileError
from encfs.keys.files import load_decryption_key
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey


class FileProvider:
    """Unwraps with the key in a file."""

    def __init__(self, path: str) -> None:
        if not path:
            raise KeyFileError("a key URI without a path", hint="write file:PATH")
        self._path = path

    @property
    def uri(self) -> str:
        return f"file:{self._path}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        key = load_decryption_key(self._path)
        try:
            return unwrap_with_key(key, recipients, content_digest, self._path)
        finally:
            if isinstance(key, SymmetricKey):
                key.wipe()

    def fetch(self) -> SymmetricKey:
        """The symmetric key in the file, which the caller wipes. Raises: KeyFileError for a private key."""
        key = load_decryption_key(self._path)
        if not isinstance(key, SymmetricKey):
            raise KeyFileError(
                f"{self._path} is a private key, and a symmetric one is needed",
                hint="make one with imagetool keygen --type oct, and encrypt to it",
            )
        return key

    def close(self) -> None:
        return
