"""PKCS #7 EnvelopedData (RFC 5652, section 6) in the dialect of Go's pkcs7 package, which ocicrypt uses.

RSA keys by PKCS #1 v1.5, recipients by issuer and serial number; the content under AES-GCM inside of plain
EnvelopedData, its parameters a SEQUENCE (without the bit for constructed ones) around SEQUENCE {[4] nonce, INTEGER 16}.
OpenSSL reads none of it. Written and read is this alone; CBC, which Go reads too, is not authenticated, and refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated

from cryptography.exceptions import InvalidTag
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509 import Name, ObjectIdentifier

from encfs.errors import FormatError, WrongKeyError
from encfs.keys.secrets import wipe
from encfs.strictjson import show_name
from imagetool.ocicrypt.keyfiles import Certificate

_ENVELOPED = ObjectIdentifier("1.2.840.113549.1.7.3")
_DATA = ObjectIdentifier("1.2.840.113549.1.7.1")
_RSA = ObjectIdentifier("1.2.840.113549.1.1.1")
_AES256_GCM = ObjectIdentifier("2.16.840.1.101.3.4.1.46")
#: Bytes of the content-encryption key.
_CONTENT: Mapping[ObjectIdentifier, int] = {ObjectIdentifier("2.16.840.1.101.3.4.1.6"): 16, _AES256_GCM: 32}

_NONCE_SIZE, _TAG_SIZE = 12, 16
_PRIMITIVE_SEQUENCE, _OCTET_STRING = b"\x10", b"\x04"
_MAX_RECIPIENTS = 64


@asn1.sequence
class _KeyAlgorithm:
    algorithm: ObjectIdentifier
    parameters: asn1.Null | None


@asn1.sequence
class _IssuerAndSerial:
    issuer: asn1.TLV
    serial: int


@asn1.sequence
class _Recipient:
    version: int
    identifier: _IssuerAndSerial
    algorithm: _KeyAlgorithm
    encrypted_key: bytes


@asn1.sequence
class _GcmParameters:
    nonce: Annotated[bytes, asn1.Implicit(4)]
    tag_size: int


@asn1.sequence
class _ContentAlgorithm:
    algorithm: ObjectIdentifier
    parameters: asn1.TLV


@asn1.sequence
class _EncryptedContent:
    content_type: ObjectIdentifier
    algorithm: _ContentAlgorithm
    content: Annotated[asn1.TLV, asn1.Explicit(0)]


@asn1.sequence
class _EnvelopedData:
    version: int
    recipients: asn1.SetOf[_Recipient]
    encrypted: _EncryptedContent


@asn1.sequence
class _ContentInfo:
    content_type: ObjectIdentifier
    content: Annotated[_EnvelopedData, asn1.Explicit(0)]


def encrypt(content: bytes | bytearray, certificate: Certificate) -> bytes:
    """A message that the key of the certificate opens. Nothing of the certificate is verified."""
    cek = bytearray(secrets.token_bytes(_CONTENT[_AES256_GCM]))
    nonce = secrets.token_bytes(_NONCE_SIZE)
    try:
        wrapped = certificate.key.encrypt(bytes(cek), padding.PKCS1v15())
        sealed = AESGCM(cek).encrypt(nonce, content, None)
    finally:
        wipe(cek)
    parameters = asn1.encode_der(_GcmParameters(nonce=nonce, tag_size=_TAG_SIZE))
    recipient = _Recipient(
        version=0,
        identifier=_IssuerAndSerial(issuer=_value(certificate.issuer), serial=certificate.serial),
        algorithm=_KeyAlgorithm(algorithm=_RSA, parameters=None),
        encrypted_key=wrapped,
    )
    encrypted = _EncryptedContent(
        content_type=_DATA,
        algorithm=_ContentAlgorithm(
            algorithm=_AES256_GCM,
            parameters=_value(_PRIMITIVE_SEQUENCE + bytes((len(parameters),)) + parameters),
        ),
        content=_value(asn1.encode_der(sealed)),
    )
    enveloped = _EnvelopedData(version=0, recipients=asn1.SetOf([recipient]), encrypted=encrypted)
    return asn1.encode_der(_ContentInfo(content_type=_ENVELOPED, content=enveloped))


def decrypt(message: bytes, key: rsa.RSAPrivateKey, name: str) -> bytearray:
    """The content, to be wiped by the caller; `name` stands for the key. Every recipient is tried.

    Raises: FormatError; WrongKeyError where the key opens none, or the content was altered: this cannot be told apart.
    """
    enveloped = _parse(message)
    size, nonce, sealed = _content(enveloped.encrypted)
    for recipient in enveloped.recipients.as_list():
        if recipient.algorithm.algorithm != _RSA:
            continue
        try:
            # Of a wrong key comes an error or, so that nobody learns anything from it, another random key.
            cek = bytearray(key.decrypt(recipient.encrypted_key, padding.PKCS1v15()))
        except ValueError:
            continue
        content = bytearray(len(sealed) - _TAG_SIZE)
        try:
            if len(cek) == size:
                AESGCM(cek).decrypt_into(nonce, sealed, None, content)
                return content
        except InvalidTag:
            wipe(content)
        finally:
            wipe(cek)
    raise WrongKeyError(f"{name} opens none of the PKCS #7 recipients")


def describe(message: bytes) -> list[str]:
    """Issuer and serial number of every recipient. Raises: FormatError."""
    return [_describe(recipient) for recipient in _parse(message).recipients.as_list()]


def _describe(recipient: _Recipient) -> str:
    try:
        issuer = show_name(Name.from_bytes(asn1.encode_der(recipient.identifier.issuer)).rfc4514_string())
    except ValueError:
        issuer = "malformed"
    return f"issuer {issuer} serial {recipient.identifier.serial:x}"


def _parse(message: bytes) -> _EnvelopedData:
    try:
        info = asn1.decode_der(_ContentInfo, message)
    except ValueError as error:
        raise FormatError(f"the PKCS #7 message is malformed: {error}") from None
    recipients: Sequence[_Recipient] = info.content.recipients.as_list()
    if info.content_type != _ENVELOPED or not 0 < len(recipients) <= _MAX_RECIPIENTS:
        raise FormatError(f"the PKCS #7 message is no enveloped data for 1 to {_MAX_RECIPIENTS} recipients")
    return info.content


def _content(encrypted: _EncryptedContent) -> tuple[int, bytes, bytes]:
    """Bytes of the key, nonce, ciphertext with tag. Raises: FormatError."""
    size = _CONTENT.get(encrypted.algorithm.algorithm)
    parameters = encrypted.algorithm.parameters
    if size is None or parameters.tag_bytes != _PRIMITIVE_SEQUENCE:
        raise FormatError("the PKCS #7 message is not encrypted with AES-GCM as ocicrypt does it")
    try:
        found = asn1.decode_der(_GcmParameters, bytes(parameters.data))
    except ValueError as error:
        raise FormatError(f"the PKCS #7 message has malformed parameters: {error}") from None
    sealed = bytes(encrypted.content.data)
    if (len(found.nonce), found.tag_size) != (_NONCE_SIZE, _TAG_SIZE) or len(sealed) < _TAG_SIZE:
        raise FormatError("the PKCS #7 message has a nonce, tag or content of the wrong length")
    if encrypted.content.tag_bytes != _OCTET_STRING:
        raise FormatError("the content of the PKCS #7 message is not one piece")
    return size, found.nonce, sealed


def _value(encoded: bytes) -> asn1.TLV:
    """Something that is in DER already."""
    return asn1.decode_der(asn1.TLV, encoded)
