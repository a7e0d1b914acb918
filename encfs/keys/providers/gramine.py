"""`gramine:[NAME]`: a key of an SGX enclave under Gramine, from the pseudo-file `/dev/attestation/keys/NAME`.

By default `_sgx_mrenclave`: the sealing key that only this very enclave on this CPU derives. `_sgx_mrsigner` is shared
by every enclave of the same signer and product, older versions included. Other names are keys that were provisioned.
Gramine's keys are 16 bytes, so the key-encryption key made of one is as strong as AES-128.

Source: Gramine documentation, "Attestation and Secret Provisioning", low-level interface.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs.errors import KeyFileError, KeyProviderError
from encfs.keys.recipients import Recipient, unwrap_with_key
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe

ROOT = Path("/dev/attestation")
DEFAULT_NAME = "_sgx_mrenclave"
#: Tells this key from all others that may be made of the same Gramine key; its name follows.
LABEL = b"encfs/1 kek gramine\0"
_KEY_SIZE = 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)


def derived_kek(name: str = DEFAULT_NAME, *, root: Path = ROOT) -> bytearray:
    """The key-encryption key made of one of Gramine's keys: 32 bytes, which the caller wipes.

    Raises: KeyFileError for a malformed name; KeyProviderError where there is no such key, or no Gramine.
    """
    if not _NAME.fullmatch(name):
        raise KeyFileError("the name of a Gramine key is 1 to 64 letters, digits, dots, dashes or underscores")
    path = root / "keys" / name
    key = bytearray(_KEY_SIZE + 1)
    try:
        try:
            with path.open("rb", buffering=0) as stream:
                size = stream.readinto(key)
        except OSError as error:
            raise KeyProviderError(
                f"{path} cannot be read: {error.strerror}",
                hint="this must run in an SGX enclave under Gramine, with sgx.remote_attestation in its manifest",
            ) from None
        if size != _KEY_SIZE or not any(key):
            raise KeyProviderError(f"{path} is not a key of {_KEY_SIZE} bytes; it was not set")
        kek = bytearray(KEK_SIZE)
        with memoryview(key) as view:
            HKDF(SHA256(), KEK_SIZE, salt=None, info=LABEL + name.encode("ascii")).derive_into(view[:_KEY_SIZE], kek)
        return kek
    finally:
        wipe(key)


class GramineProvider:
    """Unwraps with a key made of one of Gramine's, read anew each time."""

    def __init__(self, name: str) -> None:
        self._name = name or DEFAULT_NAME
        if not _NAME.fullmatch(self._name):
            raise KeyFileError(
                "the key URI gramine: has a malformed key name", hint="write gramine: or gramine:_sgx_mrsigner"
            )

    @staticmethod
    def unavailable() -> str | None:
        return None if (ROOT / "keys").is_dir() else f"{ROOT}/keys does not exist: this is no SGX enclave under Gramine"

    @property
    def uri(self) -> str:
        return f"gramine:{self._name}"

    def unwrap(self, recipients: Sequence[Recipient], content_digest: str) -> bytearray:
        key = SymmetricKey(derived_kek(self._name))
        try:
            return unwrap_with_key(key, recipients, content_digest, self.uri)
        finally:
            key.wipe()

    def close(self) -> None:
        return
