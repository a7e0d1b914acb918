"""What both ways of secure key release share: MAA is asked for a token, the vault is shown it, its answer unwrapped.

`/keys/NAME/release` checks the token against the key's release policy, and wraps the key to the one that the token
names: an AES key under RSA-OAEP, the key itself under that AES key (RFC 5649, CKM_RSA_AES_KEY_WRAP). Who has the
private half says how it decrypts. Source: Microsoft's REST references of both services.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap_with_padding

from encfs.encoding import b64url_decode
from encfs.errors import FormatError, KeyProviderError
from encfs.skr.service import ask, text_member
from encfs.strictjson import loads_object
from encfs.webclient import Address, Deadline

MAA, _VAULT = "Microsoft Azure Attestation", "Azure Key Vault"
_MAA_VERSION, _AKV_VERSION = "2020-10-01", "7.4"
#: What the vault is asked to wrap with; it may answer with another that is known.
_WRAPPING = "RSA_AES_KEY_WRAP_256"
_HASHES: Mapping[str, str] = {
    "CKM_RSA_AES_KEY_WRAP": "sha1",
    "RSA_AES_KEY_WRAP_256": "sha256",
    "RSA_AES_KEY_WRAP_384": "sha384",
}

#: RSA-OAEP of some bytes with a hash (`sha1`, `sha256`, `sha384`). Raises: ValueError.
Decrypt = Callable[[bytes, str], bytes]


@dataclass(frozen=True, slots=True)
class Release:
    """Which key is wanted of whom. `token` is a bearer's for the vault; `ca_file` None: the system's authorities."""

    vault: Address
    attestation: Address
    name: str
    token: str = field(repr=False)
    deadline: Deadline
    ca_file: str | None = None


def ask_maa(wanted: Release, kind: str, request: Mapping[str, object]) -> dict[str, object]:
    """MAA's answer about evidence of a kind (`SevSnpVM`, `AzureGuest`). Raises: KeyRefusedError, KeyProviderError."""
    path = f"/attest/{kind}?api-version={_MAA_VERSION}"
    return ask(
        wanted.attestation,
        "POST",
        path,
        request,
        deadline=wanted.deadline,
        service=MAA,
        ca_file=wanted.ca_file,
    )


def ask_vault(wanted: Release, target: str, decrypt: Decrypt, *, key_size: int) -> tuple[str, bytearray]:
    """The released key: its type (`oct`, `RSA`, `EC`) and its bytes (raw, or PKCS#8 in DER), which the caller wipes.

    `target` is MAA's token, `key_size` in bits of the RSA key that it names.

    Raises: KeyRefusedError where the release policy refuses; KeyProviderError.
    """
    released = ask(
        wanted.vault,
        "POST",
        f"/keys/{wanted.name}/release?api-version={_AKV_VERSION}",
        {"target": target, "enc": _WRAPPING},
        deadline=wanted.deadline,
        service=_VAULT,
        ca_file=wanted.ca_file,
        headers={"Authorization": f"Bearer {wanted.token}"},
    )
    try:
        return _unwrapped(text_member(released, "value", _VAULT), decrypt, key_size)
    except FormatError as error:
        raise KeyProviderError(f"{_VAULT} released something that is no wrapped key: {error.message}") from None


def _unwrapped(value: str, decrypt: Decrypt, key_size: int) -> tuple[str, bytearray]:
    """The key in a release (a JWS; who made it is known by the connection). Raises: FormatError."""
    parts = value.split(".")
    if len(parts) != 3:
        raise FormatError("it is no JWS")
    payload = loads_object(b64url_decode(parts[1], "its payload"), limit=1 << 20, what="its payload")
    key = _member(_member(_member(payload, "response"), "key"), "key")
    kind = str(key.get("kty")).removesuffix("-HSM")
    wrapped = loads_object(b64url_decode(key.get("key_hsm"), "key_hsm"), limit=1 << 20, what="key_hsm")
    algorithm = _member(wrapped, "header").get("enc")
    digest = _HASHES.get(algorithm) if isinstance(algorithm, str) else None
    if digest is None:
        raise FormatError(f"it is wrapped by {ascii(algorithm)[:40]}, which is not known")
    content = b64url_decode(wrapped.get("ciphertext"), "ciphertext")
    size = key_size // 8
    try:
        aes = decrypt(content[:size], digest)
        return kind, bytearray(aes_key_unwrap_with_padding(aes, content[size:]))
    except (ValueError, InvalidUnwrap):
        raise FormatError("it does not open with the key that was attested") from None


def _member(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    value = document.get(name)
    if not isinstance(value, dict):
        raise FormatError(f"it has no {name}")
    return value
