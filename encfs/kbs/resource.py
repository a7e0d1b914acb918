"""What a released resource holds: a key, and refusals that come with it.

Taken are 32 bytes, 44 characters of base64 (32 bytes), a JWK or PEM key, or a JSON object

    {"key": base64 of 32 bytes or a JWK, "id"?: text, "min_version"?: number, "pins"?: [content digest, …]}

A member that is not known may be a refusal of a later version: such a resource is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from encfs.encoding import b64_encode, parse_digest
from encfs.errors import EncfsError, FormatError, KeyFileError
from encfs.keys.files import decryption_key, parse_kek, parse_key
from encfs.keys.jwk import Key, PrivateKey, PublicKey
from encfs.keys.secrets import KEK_SIZE, SymmetricKey
from encfs.strictjson import MAX_INTEGER, loads_object, show_name
from encfs.trust import KeyBinding

MAX_PINS = 64
MAX_ID_SIZE = 255
_MAX_SIZE = 256 << 10
_MEMBERS = frozenset({"key", "id", "min_version", "pins"})


@dataclass(frozen=True, slots=True)
class ReleasedKey:
    """A key from a key service, and what it refuses."""

    key: PrivateKey | SymmetricKey = field(repr=False)
    binding: KeyBinding

    def wipe(self) -> None:
        if isinstance(self.key, SymmetricKey):
            self.key.wipe()


def parse_resource(content: bytes | bytearray, what: str) -> ReleasedKey:
    """`what` names the resource in messages; the caller wipes `content`. Raises: KeyFileError."""
    key, binding = _parse(content, what)
    return ReleasedKey(decryption_key(key, what), binding)


def recipient_key(content: bytes | bytearray, what: str) -> tuple[PublicKey | SymmetricKey, KeyBinding]:
    """The key to encrypt to, of what a resource holds or its public half, and what whoever opens with it refuses.

    The caller wipes `content` and what it gets. Raises: KeyFileError.
    """
    key, binding = _parse(content, what)
    return (key.public if isinstance(key, PrivateKey) else key), binding


def _parse(content: bytes | bytearray, what: str) -> tuple[Key, KeyBinding]:
    if len(content) == KEK_SIZE:
        return SymmetricKey(bytearray(content)), KeyBinding()
    if not content.lstrip().startswith(b"{"):
        return parse_kek(content, what) or parse_key(content, what), KeyBinding()
    try:
        document = loads_object(content, limit=_MAX_SIZE, what=what)
        if "key" not in document:
            return parse_key(content, what), KeyBinding()
        return _key(document["key"], what), _binding(document)
    except FormatError as error:
        raise KeyFileError(f"{what} is malformed: {error.message}") from None


def resource_document(key: bytes | bytearray, binding: KeyBinding) -> bytearray:
    """The JSON object of a 32-byte key with its refusals; the caller wipes it."""
    document: dict[str, Any] = {"key": b64_encode(key)}
    if binding.artifact_id is not None:
        document["id"] = binding.artifact_id
    if binding.min_version is not None:
        document["min_version"] = binding.min_version
    if binding.pins:
        document["pins"] = list(binding.pins)
    return bytearray(json.dumps(document).encode())


def _binding(document: dict[str, object]) -> KeyBinding:
    if unknown := set(document) - _MEMBERS:
        raise FormatError(f"it has the member {show_name(min(unknown))}, which this version does not know")
    return KeyBinding(artifact_id=_id(document), min_version=_min_version(document), pins=_pins(document.get("pins")))


def _key(value: object, what: str) -> Key:
    try:
        if isinstance(value, dict):
            return parse_key(json.dumps(value).encode(), what)
        if isinstance(value, str) and (kek := parse_kek(value.encode("utf-8", "replace"), what)) is not None:
            return kek
    except KeyFileError:
        raise
    except EncfsError as error:
        raise FormatError(error.message) from None
    raise FormatError("key is neither base64 of 32 bytes nor a JWK")


def _id(document: dict[str, object]) -> str | None:
    value = document.get("id")
    if value is not None and (not isinstance(value, str) or not 0 < len(value.encode()) <= MAX_ID_SIZE):
        raise FormatError(f"id is not 1 to {MAX_ID_SIZE} bytes of text")
    return value if isinstance(value, str) else None


def _min_version(document: dict[str, object]) -> int | None:
    value = document.get("min_version")
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise FormatError("min_version is not between 0 and 2^53-1")
    return value


def _pins(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    # An empty list would read as "anything goes", which nobody writes on purpose.
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PINS:
        raise FormatError(f"pins is not a list of 1 to {MAX_PINS} content digests")
    for pin in value:
        parse_digest(pin, "a pin")
    return tuple(str(pin) for pin in value)
