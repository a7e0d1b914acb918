"""Certificates as files have them, PEM or DER, brought to DER; and untrusted ones read. Nothing is verified here."""

from __future__ import annotations

import base64
import binascii
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.utils import CryptographyDeprecationWarning

from encfs.errors import FormatError

#: Certificates of one file.
MAX_CERTIFICATES = 16
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----", re.ASCII)
_DER_SEQUENCE = b"\x30"
# `x509` has no base for what it raises, and parses names, keys and extensions only when they are asked for.
_UNREADABLE = (
    ValueError,
    TypeError,
    IndexError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.UnsupportedGeneralNameType,
)
_warnings_lock = threading.Lock()


@contextmanager
def reading_certificates(what: str) -> Iterator[None]:
    """For reading untrusted certificates, and whatever is in them: `what` is malformed where that fails.

    Quiet: the library warns of serial numbers of 0, which AMD's have, and of names that it would not write.

    Raises: FormatError.
    """
    try:
        # Filters of warnings are the whole process's.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", CryptographyDeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    except _UNREADABLE:
        raise FormatError(f"{what} is malformed") from None


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
