"""`env:NAME`: a JWK, a PEM key, or 44 characters of base64 (a 32-byte key-encryption key) in an environment variable.

The variable is taken out of the environment at once, so that no child process inherits it: not one that another key is
asked from either. What the kernel shows in /proc/PID/environ is the environment at the start of the process and stays:
files are the better place for keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from encfs.errors import KeyFileError
from encfs.keys.files import decryption_key, parse_kek, parse_key
from encfs.keys.jwk import PrivateKey
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import SymmetricKey, wipe

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


class EnvProvider:
    """Unwraps with the key of an environment variable; keeps it until `close`, since it can be read only once.

    One that was not needed, since the artifact was refused before or another key opened it, is put back by `close`.
    """

    def __init__(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise KeyFileError("env: is not followed by the name of an environment variable", hint="write env:NAME")
        self._name = name
        value = os.environb.pop(name.encode(), None)
        self._value: bytearray | None = None if value is None else bytearray(value)
        self._key: PrivateKey | SymmetricKey | None = None

    @property
    def uri(self) -> str:
        return f"env:{self._name}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        if self._key is None:
            self._key = self._read()
        return unwrap_with_key(self._key, recipients, content_digest, self.uri)

    def close(self) -> None:
        if self._value is not None:
            os.environb[self._name.encode()] = bytes(self._value)
            wipe(self._value)
            self._value = None
        if isinstance(self._key, SymmetricKey):
            self._key.wipe()
        self._key = None

    def _read(self) -> PrivateKey | SymmetricKey:
        content, self._value = self._value, None
        if content is None:
            raise KeyFileError(f"the environment variable {self._name} is not set")
        try:
            what = f"the environment variable {self._name}"
            return parse_kek(content, what) or decryption_key(parse_key(content, what), what)
        finally:
            wipe(content)
