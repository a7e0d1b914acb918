"""From texts on a command line to recipients and keys: which scheme is meant, and which file.

| text | recipient | key |
|---|---|---|
| `FILE`, `jwe:FILE` / `file:FILE` | a public key: JWE | a private key: JWE |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from encfs.errors import KeyFileError
from encfs.keys.secrets import SymmetricKey
from encfs.strictjson import show_name
from imagetool.ocicrypt import jwe
from imagetool.ocicrypt.keyfiles import Certificate, PublicFile, load_private, load_public
from imagetool.ocicrypt.options import Element
from imagetool.ocicrypt.schemes import Opener, Recipient


@dataclass(frozen=True, slots=True)
class JweRecipient:
    """A public key."""

    file: PublicFile
    scheme: str = "jwe"

    def wrap(self, options: bytearray) -> bytes:
        return jwe.encrypt(options, self.file.key, self.file.algorithm)

    def close(self) -> None:
        return


@dataclass(frozen=True, slots=True)
class PrivateKeyOpener:
    """A private key in a file."""

    name: str
    key: jwe.JwePrivateKey = field(repr=False)

    def handles(self, scheme: str) -> bool:
        return scheme == "jwe"

    def unwrap(self, element: Element) -> bytearray:
        return jwe.decrypt(jwe.parse(element.content), self.key, self.name)

    def close(self) -> None:
        return


def parse_recipient(text: str) -> Recipient:
    """Raises: KeyFileError, NotFoundError, StorageError."""
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in _RECIPIENTS:
        return _file_recipient(text)
    if not rest:
        raise KeyFileError(f"{show_name(text)} names nothing behind {scheme}:")
    return _RECIPIENTS[scheme](rest)


def parse_opener(text: str) -> Opener:
    """Secrets in it are wiped by its `close`. Raises: KeyFileError, NotFoundError, StorageError."""
    scheme, separator, rest = text.partition(":")
    if not separator or scheme not in _OPENERS:
        return _file_opener(text)
    return _OPENERS[scheme](rest)


def _file_recipient(path: str) -> Recipient:
    key = load_public(path)
    if isinstance(key, Certificate):
        raise KeyFileError(f"{path} is a certificate, not a key")
    return JweRecipient(key)


def _file_opener(path: str) -> Opener:
    key = load_private(path)
    if isinstance(key, SymmetricKey):
        key.wipe()
        raise KeyFileError(f"{path} is a symmetric key, not a private one")
    return PrivateKeyOpener(path, key)


_RECIPIENTS: Mapping[str, Callable[[str], Recipient]] = {"jwe": _file_recipient}
_OPENERS: Mapping[str, Callable[[str], Opener]] = {"file": _file_opener}
