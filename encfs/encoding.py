"""Strict text encodings: base64url without padding (RFC 7515, section 2), base64, lower-case hex, and digests.

Each value has exactly one accepted text, so that no two documents carry the same bytes. Not for large data.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re

from encfs.errors import FormatError

Buffer = bytes | bytearray | memoryview

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})", re.ASCII)
_HEX = re.compile(r"(?:[0-9a-f]{2})*", re.ASCII)


def b64url_encode(data: Buffer) -> str:
    """base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64url_decode(text: object, what: str) -> bytes:
    """The bytes of a base64url text without padding; `what` names it in the message.

    Raises: FormatError where `text` is no string, has padding or other characters, or is not the canonical encoding
    (unused bits set).
    """
    if isinstance(text, str) and text.isascii():
        try:
            data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            pass
        else:
            if b64url_encode(data) == text:
                return data
    raise FormatError(f"{what} is not canonical base64url")


def b64_encode(data: Buffer) -> str:
    """Standard base64 with padding (RFC 4648, section 4)."""
    return base64.b64encode(data).decode("ascii")


def b64_decode(text: object, what: str) -> bytes:
    """The bytes of a standard, padded base64 text without line breaks; `what` names it in the message.

    Raises: FormatError where `text` is no string or not the canonical encoding.
    """
    if isinstance(text, str) and text.isascii():
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            pass
        else:
            if b64_encode(data) == text:
                return data
    raise FormatError(f"{what} is not canonical base64")


def b64_urlsafe_padded(data: Buffer) -> str:
    """base64url with padding (RFC 4648, section 5), as serde's `UrlSafe` writes it."""
    return base64.urlsafe_b64encode(data).decode("ascii")


def parse_b64_urlsafe(text: object, what: str) -> bytes:
    """The bytes of a base64url text with or without its padding. Raises: FormatError."""
    if isinstance(text, str) and len(text) % 4 == 0:
        text = text.removesuffix("=").removesuffix("=")
    return b64url_decode(text, what)


def hex_decode(text: object, what: str) -> bytes:
    """The bytes of a lower-case hexadecimal text. Raises: FormatError."""
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise FormatError(f"{what} is not lower-case hexadecimal")
    return bytes.fromhex(text)


def parse_digest(text: object, what: str = "digest") -> bytes:
    """The 32 bytes of a `sha256:<64 lower-case hex>` digest. Raises: FormatError."""
    match = _DIGEST.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise FormatError(f"{what} is not of the form sha256:<64 lower-case hexadecimal digits>")
    return bytes.fromhex(match[1])


def sha256_digest(content: Buffer) -> str:
    """The digest of some content as OCI writes it: `sha256:<64 lower-case hex>`."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
