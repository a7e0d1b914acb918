"""Secrets in memory: wiping what can be wiped, and the two secrets that are no key pair (KEKs and passphrases).

Wiping is best effort. Python copies `str`, `bytes` and `int` freely and libraries return immutable ones; what stays
in this project's hands is kept in `bytearray`s and overwritten once it is no longer needed.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field

from encfs.errors import KeyFileError

#: Bytes of a key-encryption key: A256KW takes nothing else.
KEK_SIZE = 32
#: Largest passphrase, bytes of UTF-8.
MAX_PASSPHRASE_SIZE = 1024


def wipe(buffer: bytearray | memoryview) -> None:
    """Overwrite a mutable buffer of bytes with zeros, keeping its length."""
    buffer[:] = bytes(len(buffer))


@dataclass(frozen=True, slots=True, eq=False)
class SymmetricKey:
    """A 32-byte key-encryption key. `kid` names it in keyrings and is never derived from the secret."""

    secret: bytearray = field(repr=False)
    kid: str | None = None

    def __post_init__(self) -> None:
        if len(self.secret) != KEK_SIZE:
            raise KeyFileError(f"a symmetric key is {KEK_SIZE} bytes, not {len(self.secret)}")

    def wipe(self) -> None:
        """Forget the secret; the key is useless afterwards."""
        wipe(self.secret)


@dataclass(frozen=True, slots=True, eq=False)
class Passphrase:
    """A passphrase as the bytes that are stretched: UTF-8 in normalisation form C. Made by `parse_passphrase`."""

    secret: bytearray = field(repr=False)

    def wipe(self) -> None:
        """Forget the secret; the passphrase is useless afterwards."""
        wipe(self.secret)


def parse_passphrase(content: bytearray, what: str) -> Passphrase:
    """A passphrase from what a person typed or a file holds; `content` is wiped, `what` names the source in messages.

    One line end at the end is dropped. The rest is brought into Unicode normalisation form C, so that the same
    characters typed on another system give the same key.

    Raises: KeyFileError where it is empty, longer than 1024 bytes, no UTF-8, or holds control characters (so a second
    line too).
    """
    try:
        end = len(content)
        if content.endswith(b"\n"):
            end -= 2 if content.endswith(b"\r\n") else 1
        if end == 0:
            raise KeyFileError(f"{what} is an empty passphrase")
        if end > MAX_PASSPHRASE_SIZE:
            raise KeyFileError(f"{what} is longer than {MAX_PASSPHRASE_SIZE} bytes")
        text = _decode(content[:end])
        if text is None:
            raise KeyFileError(f"{what} is not UTF-8 text")
        if any(unicodedata.category(character) == "Cc" for character in text):
            raise KeyFileError(f"{what} holds a control character or more than one line")
        return Passphrase(bytearray(unicodedata.normalize("NFC", text).encode()))
    finally:
        wipe(content)


def _decode(content: bytearray) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:  # it would carry the secret: not chained
        return None
    finally:
        wipe(content)
