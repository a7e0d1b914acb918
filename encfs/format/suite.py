"""Algorithm suites: names in JSON, numbers in binary structures, and the hash and key derivation they stand for.

Not here: how frames are sealed (`frames`) or what the tree looks like (`tree`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from blake3 import blake3
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs.errors import FormatError, UnsupportedError

#: Bytes of every hash in the tree, of both suites.
HASH_SIZE = 32
#: Bytes of a volume key and of the frame key derived from it.
KEY_SIZE = 32
#: Bytes of a volume's random id.
VOLUME_ID_SIZE = 16

_FRAME_KEY_INFO = b"encfs/1 frame key"


class Hasher(Protocol):
    """What `hashlib` objects and `blake3` have in common."""

    def update(self, data: bytes | bytearray | memoryview, /) -> object: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Suite:
    """One set of algorithms. `number` stands for it in associated data and in the root hash (format.md, "Suites")."""

    number: int
    hash: str
    new_hash: Callable[..., Hasher]
    aead: str = "AES-256-GCM"
    kdf: str = "HKDF-SHA256"

    def to_json(self) -> dict[str, str]:
        """The descriptor's `suite` member."""
        return {"aead": self.aead, "kdf": self.kdf, "hash": self.hash}


BLAKE3 = Suite(1, "blake3", blake3)
SHA256_SUITE = Suite(2, "sha256", hashlib.sha256)
SUITES: Mapping[str, Suite] = {suite.hash: suite for suite in (BLAKE3, SHA256_SUITE)}


def suite_by_hash(name: str) -> Suite:
    """The suite whose tree uses the hash `name`. Raises UnsupportedError."""
    try:
        return SUITES[name]
    except KeyError:
        raise UnsupportedError(f"hash {name!r} is not one of {', '.join(SUITES)}") from None


def suite_from_json(value: object) -> Suite:
    """The suite that a descriptor names. Raises FormatError, UnsupportedError."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise FormatError("the descriptor's suite is not an object of strings")
    for suite in SUITES.values():
        if value == suite.to_json():
            return suite
    raise UnsupportedError(
        "the descriptor names an algorithm suite that this version does not know", hint="use a newer version of encfs"
    )


def derive_frame_key(volume_key: bytes | bytearray, volume_id: bytes) -> bytes:
    """The AES-256-GCM key of a volume's frames: HKDF-SHA256 (RFC 5869), salt = volume id, a fixed label as info."""
    return HKDF(SHA256(), KEY_SIZE, salt=volume_id, info=_FRAME_KEY_INFO).derive(bytes(volume_key))
