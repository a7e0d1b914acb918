"""The gRPC side's messages: package `keyprovider`, service `KeyProviderService`, one `bytes` field with the number 1.

So little of Protocol Buffers that no generated code is needed (encoding.md, "Length-Delimited Records").
"""

from __future__ import annotations

import os
from typing import Any

from encfs.errors import FormatError, KeyProviderError

WRAP_METHOD = "/keyprovider.KeyProviderService/WrapKey"
UNWRAP_METHOD = "/keyprovider.KeyProviderService/UnWrapKey"

_FIELD_ONE = 0x0A  # number 1, length-delimited
_MAX_VARINT = 5


def import_grpc() -> Any:
    """The module `grpc`, told to keep what it has to say out of standard error. Raises: KeyProviderError."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import grpc
    except ImportError:
        raise KeyProviderError("gRPC is not installed", hint="install it with: pip install 'encfs[grpc]'") from None
    return grpc


def encode(content: bytes | bytearray) -> bytes:
    """A message whose field 1 is `content`."""
    return bytes((_FIELD_ONE, *encode_varint(len(content)))) + content if content else b""


def decode(message: bytes) -> bytes:
    """Field 1 of an untrusted message that has no other. Raises: FormatError."""
    if not message:
        return b""
    if message[0] != _FIELD_ONE:
        raise FormatError("the message is no key provider message")
    size, start = decode_varint(message, 1)
    if len(message) - start != size:
        raise FormatError("the message has another length than it says")
    return message[start:]


def encode_varint(number: int) -> bytes:
    """Base-128, the lowest seven bits first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def decode_varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of at most five bytes, and the position behind it. Raises: FormatError."""
    number = 0
    for index, byte in enumerate(message[position : position + _MAX_VARINT]):
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, position + index + 1
    raise FormatError("the message has a malformed number")
