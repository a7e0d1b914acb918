"""The secret payload: committed to as bytes, strict in its form, silent about its keys."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from encfs.errors import FormatError, IntegrityError
from encfs.keys.payload import MAX_PAYLOAD_SIZE, VolumeSecret, build_payload, commitment, parse_payload


@pytest.fixture
def secret() -> VolumeSecret:
    return VolumeSecret(os.urandom(16), os.urandom(32), "weights")


def test_round_trip(secret: VolumeSecret) -> None:
    config = b'{"config": {"Entrypoint": ["/bin/serve"]}}'
    content = build_payload([secret], config)
    payload = parse_payload(content, commitment(content))
    assert payload.volumes == (secret,)
    assert payload.image_config == config
    assert payload.volume(secret.id) == secret
    with pytest.raises(FormatError, match="no key for volume"):
        payload.volume(bytes(16))


def test_the_commitment_is_a_hash_with_a_label(secret: VolumeSecret) -> None:
    content = build_payload([secret])
    assert commitment(content) == hashlib.sha256(b"encfs/1 payload\0" + content).digest()
    assert commitment(bytearray(content)) == commitment(content)


def test_the_commitment_tells_nothing_since_every_payload_is_random(secret: VolumeSecret) -> None:
    assert commitment(build_payload([secret])) != commitment(build_payload([secret]))


def test_every_flipped_byte_is_refused_before_parsing(secret: VolumeSecret) -> None:
    content = build_payload([secret])
    expected = commitment(content)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        with pytest.raises(IntegrityError):
            parse_payload(changed, expected)


def test_no_key_shows_in_any_repr_or_error(secret: VolumeSecret) -> None:
    content = build_payload([secret], b"secret config")
    payload = parse_payload(content, commitment(content))
    assert repr(secret.key)[2:-1] not in repr(payload)
    assert secret.key.hex() not in repr(payload)
    assert "secret config" not in repr(payload)


Change = Callable[[dict[str, Any]], object]
MALFORMED: dict[str, Change] = {
    "another format": lambda p: p.update(format="encfs/2 payload"),
    "an unknown member": lambda p: p.update(more=1),
    "no volumes": lambda p: p.pop("volumes"),
    "volumes as object": lambda p: p.update(volumes={}),
    "a volume as text": lambda p: p.update(volumes=["x"]),
    "a volume with an unknown member": lambda p: p["volumes"][0].update(path="/"),
    "a volume without name": lambda p: p["volumes"][0].pop("name"),
    "a name that is no text": lambda p: p["volumes"][0].update(name=1),
    "a short key": lambda p: p["volumes"][0].update(key="AAAA"),
    "a padded key": lambda p: p["volumes"][0].update(key=p["volumes"][0]["key"] + "="),
    "a key that is a number": lambda p: p["volumes"][0].update(key=1),
    "a short id": lambda p: p["volumes"][0].update(id="00"),
    "an upper-case id": lambda p: p["volumes"][0].update(id="AA" * 16),
    "an image config that is no base64": lambda p: p.update(image_config="?"),
    "an image config that is an object": lambda p: p.update(image_config={}),
    "no randomness": lambda p: p.pop("random"),
    "too little randomness": lambda p: p.update(random="AAAA"),
    "a volume twice": lambda p: p["volumes"].append(p["volumes"][0]),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_payloads_are_refused_even_where_committed_to(secret: VolumeSecret, what: str) -> None:
    document = json.loads(build_payload([secret]))
    MALFORMED[what](document)
    content = json.dumps(document).encode()
    with pytest.raises(FormatError):
        parse_payload(content, commitment(content))


def test_sizes_are_bounded(secret: VolumeSecret) -> None:
    with pytest.raises(FormatError):
        build_payload([secret], bytes(MAX_PAYLOAD_SIZE))
    content = b" " * (MAX_PAYLOAD_SIZE + 1)
    with pytest.raises(FormatError):
        parse_payload(content, commitment(content))
