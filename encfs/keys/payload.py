"""The secret payload that a keyring seals: volume keys, names, an image's config; and the commitment to it.

The payload's exact bytes never change for one content descriptor. `payload_commitment` in the descriptor is checked
before anything of it is used: it commits to the keys (AES-GCM does not), and keeps one recipient from altering names or
entry point for the others. Not here: how the payload is sealed (`keyring`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import rfc8785

from encfs.encoding import b64_decode, b64_encode, b64url_decode, b64url_encode, hex_decode
from encfs.errors import FormatError, IntegrityError
from encfs.format.suite import KEY_SIZE, VOLUME_ID_SIZE
from encfs.strictjson import loads_object

#: Bytes of a payload at most; the keyring that carries it is at most 1 MiB.
MAX_PAYLOAD_SIZE = 700 << 10

_FORMAT = "encfs/1 payload"
_COMMITMENT_LABEL = b"encfs/1 payload\0"
_RANDOM_SIZE = 32


@dataclass(frozen=True, slots=True)
class VolumeSecret:
    """One volume's key and the name its owner gave it; the key is in no `repr`."""

    id: bytes
    key: bytes = field(repr=False)
    name: str = ""


@dataclass(frozen=True, slots=True)
class Payload:
    """The parsed secret payload. `image_config` holds the exact bytes of a container image's config, if it was one."""

    volumes: tuple[VolumeSecret, ...]
    image_config: bytes | None = field(default=None, repr=False)

    def volume(self, volume_id: bytes) -> VolumeSecret:
        """Raises FormatError where the payload holds no key for a volume of the descriptor."""
        for volume in self.volumes:
            if volume.id == volume_id:
                return volume
        raise FormatError(f"the keyring holds no key for volume {volume_id.hex()}")


def build_payload(volumes: Sequence[VolumeSecret], image_config: bytes | None = None) -> bytes:
    """Serialise a new payload (RFC 8785) with fresh random bytes, which hide what the commitment commits to."""
    document: dict[str, object] = {
        "format": _FORMAT,
        "random": b64url_encode(secrets.token_bytes(_RANDOM_SIZE)),
        "volumes": [{"id": v.id.hex(), "key": b64url_encode(v.key), "name": v.name} for v in volumes],
    }
    if image_config is not None:
        document["image_config"] = b64_encode(image_config)
    content = rfc8785.dumps(document)  # type: ignore[arg-type]
    if len(content) > MAX_PAYLOAD_SIZE:
        raise FormatError(f"the secret payload has {len(content)} bytes, more than the {MAX_PAYLOAD_SIZE} allowed")
    return content


def commitment(content: bytes | bytearray) -> bytes:
    """SHA-256("encfs/1 payload\\0" || payload bytes)."""
    digest = hashlib.sha256(_COMMITMENT_LABEL)
    digest.update(content)
    return digest.digest()


def parse_payload(content: bytes | bytearray, expected_commitment: bytes) -> Payload:
    """Raises IntegrityError where it is not the payload that the descriptor commits to, FormatError where malformed."""
    if not hmac.compare_digest(commitment(content), expected_commitment):
        raise IntegrityError(
            "the keyring's payload is not the one that the content descriptor commits to",
            hint="somebody who holds a key replaced it; get the artifact again from its owner",
        )
    document = loads_object(content, limit=MAX_PAYLOAD_SIZE, what="the secret payload")
    volumes, config = document.get("volumes"), document.get("image_config")
    known: set[str] = {"format", "random", "volumes", "image_config"}
    if document.get("format") != _FORMAT or not isinstance(volumes, list) or not document.keys() <= known:
        raise FormatError("the secret payload is malformed", hint="use a newer version of encfs")
    if len(b64url_decode(document.get("random"), "the secret payload's random")) != _RANDOM_SIZE:
        raise FormatError(f"the secret payload's random is not of {_RANDOM_SIZE} bytes")
    secrets_by_volume = tuple(_volume_secret(item) for item in volumes)
    if len({volume.id for volume in secrets_by_volume}) != len(secrets_by_volume):
        raise FormatError("the secret payload repeats a volume")
    return Payload(
        secrets_by_volume, None if config is None else b64_decode(config, "the secret payload's image_config")
    )


def _volume_secret(value: object) -> VolumeSecret:
    if not isinstance(value, Mapping) or value.keys() != {"id", "key", "name"} or not isinstance(value["name"], str):
        raise FormatError("a volume of the secret payload is malformed")
    volume_id = hex_decode(value["id"], "a volume id of the secret payload")
    key = b64url_decode(value["key"], "a volume key of the secret payload")
    if len(volume_id) != VOLUME_ID_SIZE or len(key) != KEY_SIZE:
        raise FormatError("a volume of the secret payload has an id or key of the wrong size")
    return VolumeSecret(volume_id, key, value["name"])
