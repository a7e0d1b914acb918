"""The encryption of a resource to a session's key: flattened JWE (RFC 7516, section 7.2.2), enc A256GCM.

| `alg` | session key | `encrypted_key` |
|---|---|---|
| `ECDH-ES+A256KW` (RFC 7518, 4.6), `epk` in the protected header | P-256, P-384, P-521 | 40 bytes |
| `RSA-OAEP-256` (4.3) | RSA | as long as the modulus |

The protected header is the associated data. Clients of Confidential Containers do not take its bytes for that, but
write anew what they parsed (kbs-types, `ProtectedHeader::generate_aad`): `alg` and `enc` first, then everything else in
the order of its name, without spaces; so this is how it is written. `epk` may also stand in the unprotected `header`,
where other JOSE libraries put it: another one there opens nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap, aes_key_wrap

from encfs.encoding import b64url_decode, b64url_encode
from encfs.errors import FormatError, IntegrityError, KeyFileError
from encfs.keys import jwk, jwkjson
from encfs.keys.jwk import KeyKind, PrivateKey, PublicKey
from encfs.keys.recipients import CEK_SIZE, ECDH, RSA, agreed_kek
from encfs.keys.secrets import wipe
from encfs.strictjson import loads_object

_ENC = "A256GCM"
_IV_SIZE, _TAG_SIZE = 12, 16
_MAX_HEADER = 8 << 10
_MAX_RSA_BYTES = jwk.MAX_RSA_BITS // 8
_RSA_BITS = 3072
_ALGORITHMS: Mapping[KeyKind, str] = {KeyKind.P256: ECDH, KeyKind.P384: ECDH, KeyKind.RSA: RSA}
#: Clients of Confidential Containers may have session keys on P-521 as well; keys of artifacts are on no such curve.
_P521 = "P-521"

#: The public half of a session's key pair, checked.
SessionKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


def session_key(*, use_rsa: bool = False) -> PrivateKey:
    """A fresh key pair for one session: P-256, or RSA for servers that know nothing else."""
    if use_rsa:
        return jwk.private_key(rsa.generate_private_key(65537, _RSA_BITS))
    return jwk.private_key(ec.generate_private_key(ec.SECP256R1()))


def public_members(key: PublicKey) -> dict[str, str]:
    """The public JWK as the protocol carries it: `kty`, `alg` and the numbers, nothing else."""
    return jwk.public_members(key.handle) | {"alg": _ALGORITHMS[key.kind]}


def parse_public(members: object) -> SessionKey:
    """The session key of an untrusted message. Raises: FormatError."""
    if not isinstance(members, dict):
        raise FormatError("tee-pubkey is not a JSON object")
    if members.get("alg") not in (ECDH, RSA):
        raise FormatError(f"tee-pubkey has an alg that is not supported; {ECDH} and {RSA} are")
    if len(members) > 5 or not all(isinstance(value, str) for value in members.values()):
        raise FormatError("tee-pubkey has members that do not belong to a public key")
    try:
        if members.get("crv") == _P521:
            return _p521_key(members)
        key = jwkjson.key_from_jwk(members)
    except KeyFileError as error:
        raise FormatError(f"tee-pubkey {error.message}") from None
    if isinstance(key, PublicKey) and isinstance(key.handle, SessionKey):
        return key.handle
    raise FormatError("tee-pubkey is no public EC or RSA key")


def _p521_key(members: Mapping[str, object]) -> ec.EllipticCurvePublicKey:
    """Raises: KeyFileError."""
    if set(members) != {"kty", "crv", "alg", "x", "y"} or (members["kty"], members["alg"]) != ("EC", ECDH):
        raise KeyFileError(f"on the curve {_P521} has other members than an EC key for {ECDH}")
    try:
        return jwkjson.point_from_jwk(members, ec.SECP521R1(), _P521)
    except FormatError as error:
        raise KeyFileError(f"is a malformed JWK: {error.message}") from None


def encrypt(content: bytes | bytearray, key: SessionKey) -> dict[str, str]:
    """The members of the JWE that only the holder of the session's private key opens."""
    cek = bytearray(os.urandom(CEK_SIZE))
    header: dict[str, object] = {"alg": RSA if isinstance(key, rsa.RSAPublicKey) else ECDH, "enc": _ENC}
    try:
        if isinstance(key, rsa.RSAPublicKey):
            wrapped = jwk.encrypt_oaep(key, cek)
        else:
            ephemeral = ec.generate_private_key(key.curve)
            header["epk"] = dict(sorted(jwk.point_members(ephemeral.public_key()).items()))
            kek = agreed_kek(ephemeral.exchange(ec.ECDH(), key))
            wrapped = aes_key_wrap(kek, cek)
            wipe(kek)
        protected = b64url_encode(json.dumps(header, separators=(",", ":")).encode())
        iv = os.urandom(_IV_SIZE)
        sealed = AESGCM(cek).encrypt(iv, content, protected.encode("ascii"))
    finally:
        wipe(cek)
    return {
        "protected": protected,
        "encrypted_key": b64url_encode(wrapped),
        "iv": b64url_encode(iv),
        "ciphertext": b64url_encode(sealed[:-_TAG_SIZE]),
        "tag": b64url_encode(sealed[-_TAG_SIZE:]),
    }


def decrypt(document: Mapping[str, object], key: PrivateKey) -> bytearray:
    """The content, to be wiped by the caller. Further members at the top are ignored (Trustee writes empty ones).

    Raises: FormatError; IntegrityError where it was altered or is for another key.
    """
    protected = document.get("protected")
    header_text = b64url_decode(protected, "the JWE's protected header")
    header = loads_object(header_text, limit=_MAX_HEADER, what="the JWE's protected header")
    if header.get("alg") != _ALGORITHMS[key.kind] or header.get("enc") != _ENC or {"zip", "crit"} & set(header):
        raise FormatError("the JWE's algorithms are not those of the session")
    wrapped = b64url_decode(document.get("encrypted_key"), "the JWE's encrypted_key")
    iv = b64url_decode(document.get("iv"), "the JWE's iv")
    ciphertext = b64url_decode(document.get("ciphertext"), "the JWE's ciphertext")
    tag = b64url_decode(document.get("tag"), "the JWE's tag")
    if len(iv) != _IV_SIZE or len(tag) != _TAG_SIZE or len(wrapped) > _MAX_RSA_BYTES:
        raise FormatError("the JWE has members of the wrong length")
    content = bytearray(len(ciphertext))
    cek = bytearray()
    try:
        cek += _unwrap(header, document.get("header"), wrapped, key)
        _require_size(cek)
        AESGCM(cek).decrypt_into(iv, ciphertext + tag, str(protected).encode("ascii"), content)
    except (InvalidTag, InvalidUnwrap, ValueError):
        wipe(content)
    else:
        return content
    finally:
        wipe(cek)
    raise IntegrityError("the resource was altered on its way, or is not for this session")


def _require_size(cek: bytearray) -> None:
    if len(cek) != CEK_SIZE:
        raise ValueError("not an AES-256 key")


def _unwrap(header: Mapping[str, object], unprotected: object, wrapped: bytes, key: PrivateKey) -> bytes:
    if key.kind is KeyKind.RSA:
        return key.decrypt_oaep(wrapped)
    if header.keys() & {"apu", "apv"}:
        raise FormatError("the JWE names its parties, which this protocol does not")
    epk = header.get("epk")
    if epk is None and isinstance(unprotected, dict):
        epk = unprotected.get("epk")
    kek = agreed_kek(key.exchange(jwkjson.agreement_key_from_jwk(epk)))
    try:
        return aes_key_unwrap(kek, wrapped)
    finally:
        wipe(kek)
