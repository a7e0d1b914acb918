"""A key sealed under one that this guest or enclave derives (`snp:`, `gramine:`): the file behind `sealed:FILE`. JSON.

    {
      "format": "encfs-sealed/1",
      "under": "snp:svn=3",          key URI of the derived key
      "kid": TEXT or null,
      "iv": BASE64URL, "sealed": BASE64URL    AES-256-GCM; associated data: format, under and kid
    }

Nothing in it is secret. It opens where the same key is derived: in the same guest or enclave, on the same processor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from encfs.attestation.collect.sources import THIS_MACHINE, Machine
from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import FormatError, KeyFileError, KeyRefusedError
from encfs.keys.files import create_file, read_key_file
from encfs.keys.jwkjson import check_kid
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.strictjson import loads_object, show_name

FORMAT = "encfs-sealed/1"
#: Tells the key of these files from the one that opens keyrings by itself.
LABEL = b"encfs/1 sealed file"
_IV_SIZE, _TAG_SIZE = 12, 16
_MAX_SIZE = 16 << 10
_MEMBERS = frozenset({"format", "under", "kid", "iv", "sealed"})


@dataclass(frozen=True, slots=True)
class SealedKey:
    """The content of such a file."""

    under: str
    kid: str | None
    iv: bytes
    sealed: bytes = field(repr=False)

    @property
    def associated(self) -> bytes:
        return json.dumps([FORMAT, self.under, self.kid]).encode()


def seal_under(key: SymmetricKey, under: str, *, machine: Machine | None = None) -> SealedKey:
    """`key` under the key that this machine derives for the key URI `under`.

    Raises: KeyFileError for a malformed URI; KeyProviderError where nothing can be derived here.
    """
    empty = SealedKey(under, key.kid, os.urandom(_IV_SIZE), b"")
    derived = _derived(under, machine or THIS_MACHINE)
    try:
        sealed = AESGCM(derived).encrypt(empty.iv, key.secret, empty.associated)
    finally:
        wipe(derived)
    return SealedKey(under, key.kid, empty.iv, sealed)


def unseal_under(found: SealedKey, *, machine: Machine | None = None) -> SymmetricKey:
    """The key, which the caller wipes.

    Raises: KeyRefusedError where this guest or enclave derives another key; KeyProviderError where none.
    """
    derived = _derived(found.under, machine or THIS_MACHINE)
    try:
        secret = bytearray(AESGCM(derived).decrypt(found.iv, found.sealed, found.associated))
    except InvalidTag:
        raise KeyRefusedError(
            f"the key of this machine ({found.under}) is not the one that it was sealed under",
            hint="another guest, enclave, version or processor; get the key from where it came from, and seal it again",
        ) from None
    finally:
        wipe(derived)
    return SymmetricKey(secret, found.kid)


def write_sealed(found: SealedKey, path: str | os.PathLike[str]) -> None:
    """Write a new file (mode 0600). Raises: ConflictError where it exists, NotFoundError, StorageError."""
    document = {
        "format": FORMAT,
        "under": found.under,
        "kid": found.kid,
        "iv": b64url_encode(found.iv),
        "sealed": b64url_encode(found.sealed),
    }
    create_file(path, bytearray(json.dumps(document, indent=2).encode() + b"\n"), 0o600)


def load_sealed(path: str | os.PathLike[str]) -> SealedKey:
    """Raises: KeyFileError where it is no such file; NotFoundError, StorageError."""
    content, _ = read_key_file(path)
    try:
        return _parse(loads_object(content, limit=_MAX_SIZE, what="it"))
    except FormatError as error:
        raise KeyFileError(f"{path} is no sealed key: {error.message}", hint="make one with encfs seal") from None


def is_sealed_under(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is one of these. Raises: NotFoundError, StorageError."""
    content, _ = read_key_file(path)
    try:
        return loads_object(content, limit=len(content), what="it").get("format") == FORMAT
    except FormatError:
        return False


def _parse(document: Mapping[str, object]) -> SealedKey:
    if document.get("format") != FORMAT:
        raise FormatError(f"its format is not {FORMAT}")
    if set(document) != _MEMBERS:
        raise FormatError("it has members too many, or too few")
    under, kid = document["under"], document["kid"]
    if not isinstance(under, str) or not isinstance(kid, str | None):
        raise FormatError("under or kid is no text")
    iv, sealed = b64url_decode(document["iv"], "iv"), b64url_decode(document["sealed"], "sealed")
    if len(iv) != _IV_SIZE or len(sealed) != KEK_SIZE + _TAG_SIZE:
        raise FormatError("iv or sealed has a wrong length")
    return SealedKey(under, check_kid(kid) if kid is not None else None, iv, sealed)


def _derived(under: str, machine: Machine) -> bytearray:
    scheme, _, rest = under.partition(":")
    derive = _SCHEMES.get(scheme)
    if derive is None:
        raise KeyFileError(f"a key cannot be sealed under {show_name(under)}", hint="under snp: or gramine:")
    kek = derive(rest, machine)
    derived = bytearray(KEK_SIZE)
    try:
        HKDF(SHA256(), KEK_SIZE, salt=None, info=LABEL).derive_into(kek, derived)
    finally:
        wipe(kek)
    return derived


def _snp(rest: str, machine: Machine) -> bytearray:
    from encfs.keys.providers.snp import derived_kek, parse_options

    return derived_kek(parse_options(rest), device=machine.sev_guest, ioctl=machine.ioctl)


def _gramine(rest: str, machine: Machine) -> bytearray:
    from encfs.keys.providers.gramine import DEFAULT_NAME, derived_kek

    return derived_kek(rest or DEFAULT_NAME, root=machine.gramine)


_SCHEMES: Mapping[str, Callable[[str, Machine], bytearray]] = {"snp": _snp, "gramine": _gramine}
