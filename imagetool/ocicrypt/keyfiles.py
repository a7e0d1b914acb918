"""Key files as ocicrypt's users have them: PEM or DER (PKCS#8, PKCS#1, SEC 1, SubjectPublicKeyInfo), X.509, JWK, KEKs.

More than `encfs.keys.files` takes: P-521, DER, certificates, and JWKs that name one of ocicrypt's algorithms. Keys
under a passphrase are not taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    load_der_private_key,
    load_der_public_key,
    load_pem_private_key,
    load_pem_public_key,
)

from encfs.errors import FormatError, KeyFileError
from encfs.keys import jwkjson
from encfs.keys.files import MAX_KEY_FILE_SIZE, parse_kek, read_key_file
from encfs.keys.jwk import Use, check_rsa_numbers
from encfs.keys.secrets import KEK_SIZE, SymmetricKey, wipe
from encfs.strictjson import loads_object
from imagetool.ocicrypt.jwe import ALGORITHMS, JwePrivateKey, JwePublicKey

_JWK_ALGORITHMS = frozenset(name for names in ALGORITHMS.values() for name in names)


@dataclass(frozen=True, slots=True)
class PublicFile:
    """A public key; `algorithm` is the one that its JWK asks for."""

    key: JwePublicKey
    algorithm: str | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What PKCS #7 needs of an X.509 certificate; nothing of it is verified. `issuer` is the name in DER."""

    issuer: bytes
    serial: int
    key: rsa.RSAPublicKey


def load_public(path: str | os.PathLike[str]) -> PublicFile | Certificate:
    """The key or certificate to encrypt to; of a private key the public half.

    Raises: KeyFileError, NotFoundError, StorageError.
    """
    content, _ = read_key_file(path)
    try:
        key, algorithm = _parse(content, str(path))
    finally:
        wipe(content)
    match key:
        case Certificate():
            return key
        case rsa.RSAPrivateKey() | ec.EllipticCurvePrivateKey():
            return PublicFile(key.public_key(), algorithm)
        case SymmetricKey():
            key.wipe()
            raise KeyFileError(
                f"{path} is a symmetric key, which images are encrypted to through a key provider",
                hint="for Confidential Containers: -r coco:kbs:///REPOSITORY/TYPE/TAG --kek FILE",
            )
        case _:
            return PublicFile(key, algorithm)


def load_private(path: str | os.PathLike[str]) -> JwePrivateKey | SymmetricKey:
    """The key to decrypt with. A symmetric one is wiped by the caller. Raises: as `load_public`."""
    content, access = read_key_file(path)
    try:
        key, _ = _parse(content, str(path))
        if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey | Certificate):
            raise KeyFileError(f"{path} is a public key or a certificate; decrypting needs the private key")
        access.check()
    finally:
        wipe(content)
    return key


_Loaded = TypeVar("_Loaded")
_Parsed = JwePublicKey | JwePrivateKey | SymmetricKey | Certificate


def _parse(content: bytearray, path: str) -> tuple[_Parsed, str | None]:
    try:
        if (kek := _kek(content, path)) is not None:
            return kek, None
        if content.lstrip().startswith(b"{"):
            return _from_jwk(content)
        key = _from_pem(bytes(content)) if b"-----BEGIN " in content else _from_der(bytes(content))
        return _checked(key), None
    except FormatError as error:
        raise KeyFileError(f"{path} is a malformed JWK: {error.message}") from None
    except KeyFileError as error:
        raise KeyFileError(f"{path} {error.message}", hint=error.hint) from None


def _kek(content: bytearray, path: str) -> SymmetricKey | None:
    """32 bytes, as key brokers hand them out, or the base64 of them."""
    if len(content) == KEK_SIZE:
        return SymmetricKey(bytearray(content))
    return parse_kek(content, path)


def _from_jwk(content: bytearray) -> tuple[_Parsed, str | None]:
    members = loads_object(content, limit=MAX_KEY_FILE_SIZE, what="it")
    algorithm = members.get("alg")
    if algorithm in _JWK_ALGORITHMS:
        # This project's own keys know fewer of them.
        del members["alg"]
    key = jwkjson.key_from_jwk(members)
    if isinstance(key, SymmetricKey):
        return key, None
    key.require(Use.ENCRYPT, "it")
    return _checked(key.handle), str(algorithm) if algorithm in _JWK_ALGORITHMS else None


def _from_pem(content: bytes) -> object:
    if b"ENCRYPTED" in content:
        raise KeyFileError(
            "is a PEM key under a passphrase, which is not supported", hint="remove it: openssl pkey -in FILE -out NEW"
        )
    if b"PRIVATE KEY-----" in content:
        return _tried(lambda: load_pem_private_key(content, None))
    if b"-----BEGIN CERTIFICATE-----" in content:
        return _certificate(content, pem=True)
    return _tried(lambda: load_pem_public_key(content))


def _from_der(content: bytes) -> object:
    for load in (
        lambda: load_der_private_key(content, None),
        lambda: load_der_public_key(content),
        lambda: _certificate(content, pem=False),
    ):
        try:
            return _tried(load)
        except KeyFileError:
            continue
    raise KeyFileError("is neither a JWK nor a key or certificate in PEM or DER")


def _certificate(content: bytes, *, pem: bool) -> Certificate:
    from cryptography import x509  # slow to import, and needed by few

    from encfs.attestation.certificates import reading_certificates

    read = x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate
    try:
        with reading_certificates("the certificate"):
            certificate = read(content)
            key = certificate.public_key()
            issuer = certificate.issuer.public_bytes()
    except FormatError:
        raise KeyFileError("is a malformed certificate, or one of a key of an unsupported type") from None
    if not isinstance(key, rsa.RSAPublicKey):
        raise KeyFileError("is a certificate without an RSA key, which PKCS #7 needs here")
    return Certificate(issuer, certificate.serial_number, _checked_rsa(key))


def _tried(load: Callable[[], _Loaded]) -> _Loaded:
    try:
        return load()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        pass  # raised below, without the context of a parser that may quote the content
    raise KeyFileError("is a malformed key, or one of an unsupported type")


def _checked(key: object) -> _Parsed:
    match key:
        case rsa.RSAPublicKey():
            return _checked_rsa(key)
        case rsa.RSAPrivateKey():
            _checked_rsa(key.public_key())
            return key
        case ec.EllipticCurvePublicKey() | ec.EllipticCurvePrivateKey() | Certificate():
            return key
        case _:
            raise KeyFileError("is of a type that ocicrypt does not know", hint="use an RSA or EC key")


def _checked_rsa(key: rsa.RSAPublicKey) -> rsa.RSAPublicKey:
    numbers = key.public_numbers()
    check_rsa_numbers(numbers.n, numbers.e)
    return key
