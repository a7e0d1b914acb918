"""Certificates as files have them, PEM or DER, brought to DER. Nothing is parsed further or verified here."""

from __future__ import annotations

import base64
import binascii
import re

from encfs.errors import FormatError

#: Certificates of one file.
MAX_CERTIFICATES = 16
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----", re.ASCII)
_DER_SEQUENCE = b"\x30"


def der_certificates(content: bytes, what: str) -> tuple[bytes, ...]:
    """All certificates of a PEM file, or the one of a DER file. Raises: FormatError where there is none, or too many.

    `cryptography` is not asked: it warns of AMD's certificates, whose serial number is 0.
    """
    if content.startswith(_DER_SEQUENCE):
        return (content,)
    blocks = _BLOCK.findall(content)
    if not 0 < len(blocks) <= MAX_CERTIFICATES:
        raise FormatError(f"{what} is not DER, and does not hold 1 to {MAX_CERTIFICATES} certificates in PEM")
    try:
        return tuple(base64.b64decode(b"".join(block.split()), validate=True) for block in blocks)
    except binascii.Error:
        raise FormatError(f"{what} has a malformed certificate") from None
