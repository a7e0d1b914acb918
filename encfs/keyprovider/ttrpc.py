"""One call over ttrpc: gRPC's little sibling on a unix socket, spoken by the Confidential Data Hub of CoCo guests.

Frame: length u32, stream u32 (big-endian), type u8 (1 request, 2 response), flags u8, then the message.

    Request    1 service (text)  2 method (text)  3 payload (bytes)  4 timeout in nanoseconds
    Response   1 Status {1 code  2 message (text)}  2 payload (bytes)

Source: github.com/containerd/ttrpc, PROTOCOL.md.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

from encfs.errors import FormatError, KeyProviderError
from encfs.keyprovider.grpcmessage import decode, decode_varint, encode, encode_varint
from encfs.keyprovider.protocol import MAX_MESSAGE_SIZE

_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2
_STREAM = 1  # a client's streams are odd
_LENGTH_DELIMITED, _VARINT = 2, 0


def call(path: str, method: str, request: bytearray, timeout: float, what: str) -> bytearray:
    """The payload of the answer; `method` as gRPC writes it, `what` names the server. Raises: KeyProviderError."""
    deadline = time.monotonic() + timeout
    service, _, name = method[1:].partition("/")
    message = _field(1, service.encode()) + _field(2, name.encode()) + _field(3, encode(request))
    message += bytes((4 << 3 | _VARINT, *encode_varint(int(timeout * 1e9))))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(path)
            connection.sendall(_HEADER.pack(len(message), _STREAM, _REQUEST, 0) + message)
            return _payload(_receive_message(connection, deadline), what)
    except FormatError as error:
        raise KeyProviderError(f"{what}: {error.message}") from None
    except OSError as error:
        raise KeyProviderError(f"{what} at {path} gives no answer: {error.strerror or error}") from None


def _receive_message(connection: socket.socket, deadline: float) -> bytes:
    size, stream, kind, _ = _HEADER.unpack(_receive(connection, _HEADER.size, deadline))
    if kind != _RESPONSE or stream != _STREAM or size > MAX_MESSAGE_SIZE:
        raise FormatError("the answer is none, or too large")
    return bytes(_receive(connection, size, deadline))


def _receive(connection: socket.socket, size: int, deadline: float) -> bytearray:
    """Raises: TimeoutError and other OSErrors; FormatError."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        count = connection.recv_into(view)
        if count == 0:
            raise FormatError("the connection ended in the middle of the answer")
        view = view[count:]
    return content


def _payload(message: bytes, what: str) -> bytearray:
    payload, code, detail = b"", 0, b""
    for number, value in _fields(message):
        if number == 2 and isinstance(value, bytes):
            payload = value
        elif number == 1 and isinstance(value, bytes):
            for inner, part in _fields(value):
                if inner == 1 and isinstance(part, int):
                    code = part
                elif inner == 2 and isinstance(part, bytes):
                    detail = part
    if code:
        text = ascii(detail.decode("utf-8", "replace"))[1:-1][:300]
        raise KeyProviderError(f"{what} failed with code {code}: {text}")
    content = bytearray(decode(payload))
    if not content:
        raise FormatError("the answer is empty")
    return content


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of an untrusted message. Raises: FormatError."""
    position = 0
    while position < len(message):
        tag, position = decode_varint(message, position)
        value, position = decode_varint(message, position)
        if tag & 7 == _VARINT:
            yield tag >> 3, value
            continue
        if tag & 7 != _LENGTH_DELIMITED or value > len(message) - position:
            raise FormatError("the answer is malformed")
        yield tag >> 3, message[position : position + value]
        position += value


def _field(number: int, content: bytes) -> bytes:
    return bytes((number << 3 | _LENGTH_DELIMITED, *encode_varint(len(content)))) + content
