"""What the key-encryption key (KEK) of a broker protects: keys at rest, the MACs of state, log, cookies and tokens.

Each use has a key of its own: HKDF-SHA256(KEK, salt = the database's id, info = label). A key at rest is sealed by
AES-256-GCM; its associated data say which database, path, policy rule, floor and revision it belongs to, so that a row
that was moved, or put under another policy, does not open.
"""

from __future__ import annotations

import hmac
import os
from dataclasses import dataclass

import rfc8785
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs.errors import IntegrityError
from encfs.keys.secrets import SymmetricKey, wipe

_FORMAT = "encfs-broker/1"
_NONCE_SIZE = 12
_MAC = "sha256"


@dataclass(frozen=True, slots=True)
class RowIdentity:
    """Where a sealed key belongs. `rule` is the digest of the policy's rule for it, empty where there is none."""

    path: str
    kind: str
    rule: str
    artifact_id: str | None
    min_version: int | None
    revision: int


@dataclass(frozen=True, slots=True)
class SealedRow:
    """AES-256-GCM: nonce, and ciphertext with its tag."""

    nonce: bytes
    sealed: bytes


class Vault:
    """The keys that come from one KEK for one database; `database_id` is 32 hexadecimal digits."""

    def __init__(self, kek: SymmetricKey, database_id: str) -> None:
        self.database_id = database_id
        self._rows = AESGCM(_derived(kek, database_id, "keys"))
        self._macs = {use: _derived(kek, database_id, use) for use in ("state", "log", "session", "token")}

    def seal(self, identity: RowIdentity, content: bytes | bytearray) -> SealedRow:
        nonce = os.urandom(_NONCE_SIZE)
        return SealedRow(nonce, self._rows.encrypt(nonce, content, self._associated(identity)))

    def open(self, identity: RowIdentity, row: SealedRow) -> bytearray:
        """The content, to be wiped by the caller. Raises: IntegrityError where the row does not belong there."""
        content = bytearray(max(0, len(row.sealed) - 16))
        try:
            self._rows.decrypt_into(row.nonce, row.sealed, self._associated(identity), content)
        except (InvalidTag, ValueError):
            wipe(content)
            raise IntegrityError(
                f"the key {identity.path} in the broker's database does not open: it was altered, moved or put under "
                "another policy",
                hint="restore the database, or add the key again",
            ) from None
        return content

    def mac(self, use: str, content: bytes) -> bytes:
        """HMAC-SHA256 for one of the uses `state`, `log`, `session`, `token`."""
        return hmac.digest(self._macs[use], content, _MAC)

    def check(self, use: str, content: bytes, mac: bytes) -> bool:
        return hmac.compare_digest(self.mac(use, content), mac)

    def _associated(self, identity: RowIdentity) -> bytes:
        return rfc8785.dumps(
            {
                "format": _FORMAT,
                "database": self.database_id,
                "path": identity.path,
                "kind": identity.kind,
                "rule": identity.rule,
                "artifact_id": identity.artifact_id,
                "min_version": identity.min_version,
                "revision": identity.revision,
            }
        )


def _derived(kek: SymmetricKey, database_id: str, use: str) -> bytes:
    info = f"{_FORMAT} {use}".encode()
    return HKDF(SHA256(), 32, bytes.fromhex(database_id), info).derive(bytes(kek.secret))
