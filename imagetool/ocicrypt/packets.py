"""The key packet of Confidential Containers: private options under a KEK that a key broker holds, named by its URI.

    v1  {"kid", "wrapped_data", "iv", "wrap_type"}
    v2  and "version": "0.1.0", "provider", "provider_settings", "annotations"

`wrapped_data` is AES-256-GCM ciphertext and tag, without associated data; everything is base64. Written is v1, which
every guest reads. A256CTR, which some providers offer, is not authenticated, and refused.

Source: github.com/confidential-containers/guest-components, attestation-agent/docs/IMAGE_ENCRYPTION.md.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from encfs.encoding import b64_decode, b64_encode
from encfs.errors import FormatError, IntegrityError, KeyFileError
from encfs.keyprovider.protocol import MAX_DATA_SIZE
from encfs.keys.secrets import SymmetricKey, wipe
from encfs.strictjson import loads_object, show_name

#: What the key provider of guests is called: the end of the annotation's name.
PROVIDER = "attestation-agent"

_IV_SIZE, _TAG_SIZE = 12, 16
_WRAP_TYPE = "A256GCM"
_KID = re.compile(
    r"kbs(?:\+[a-z0-9-]{1,32})?://(?:[A-Za-z0-9.-]{1,255}(?::\d{1,5})?)?(?:/[A-Za-z0-9._-]{1,128}){1,8}(?:\?[!-~]{1,255})?",
    re.ASCII,
)
_MEMBERS = {"kid", "wrapped_data", "iv", "wrap_type", "version", "provider", "provider_settings", "annotations"}


@dataclass(frozen=True, slots=True)
class Packet:
    """A parsed packet."""

    kid: str
    iv: bytes
    wrapped: bytes = field(repr=False)


def check_kid(text: str) -> str:
    """`text` itself if it names a resource of a key broker, as `kbs:///REPOSITORY/TYPE/TAG`. Raises: KeyFileError."""
    if not _KID.fullmatch(text):
        raise KeyFileError(
            f"{show_name(text)} names no resource of a key broker", hint="write kbs:///REPOSITORY/TYPE/TAG"
        )
    return text


def wrap(options: bytes | bytearray, kek: SymmetricKey, kid: str) -> bytes:
    """A packet of version 1, as JSON text."""
    iv = os.urandom(_IV_SIZE)
    document = {
        "kid": kid,
        "wrapped_data": b64_encode(AESGCM(kek.secret).encrypt(iv, options, None)),
        "iv": b64_encode(iv),
        "wrap_type": _WRAP_TYPE,
    }
    return json.dumps(document, separators=(",", ":")).encode()


def parse(content: bytes) -> Packet:
    """An untrusted packet of either version. Raises: FormatError."""
    document = loads_object(content, limit=MAX_DATA_SIZE, what="the key packet")
    if unknown := set(document) - _MEMBERS:
        raise FormatError(f"the key packet has the unknown member {show_name(min(unknown))}")
    if document.get("version", "0.1.0") != "0.1.0" or document.get("provider", "kbs") != "kbs":
        raise FormatError("the key packet is of a version or provider that is not supported")
    kid = document.get("kid")
    if not isinstance(kid, str) or not _KID.fullmatch(kid):
        raise FormatError("the key packet names no resource of a key broker")
    if document.get("wrap_type") != _WRAP_TYPE:
        raise FormatError(f"the key packet's wrap_type {show_name(document.get('wrap_type'))} is not {_WRAP_TYPE}")
    iv = b64_decode(document.get("iv"), "the key packet's iv")
    wrapped = b64_decode(document.get("wrapped_data"), "the key packet's wrapped_data")
    if len(iv) != _IV_SIZE or len(wrapped) < _TAG_SIZE:
        raise FormatError("the key packet has members of the wrong length")
    return Packet(kid, iv, wrapped)


def unwrap(packet: Packet, kek: SymmetricKey) -> bytearray:
    """The private options, which the caller wipes. Raises: IntegrityError where it is for another key, or altered."""
    options = bytearray(len(packet.wrapped) - _TAG_SIZE)
    try:
        AESGCM(kek.secret).decrypt_into(packet.iv, packet.wrapped, None, options)
    except InvalidTag:
        wipe(options)  # it holds what was not authenticated
    else:
        return options
    raise IntegrityError(f"the key packet of {packet.kid} is for another key, or was altered")
