"""The content descriptor and the manifest: what is written is read back, and everything contradictory is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import rfc8785

from encfs.encoding import sha256_digest
from encfs.errors import EncfsError, FormatError, UnsupportedError
from encfs.format.descriptor import (
    KEYRING_TYPE,
    MAX_SIGNATURES,
    SEGMENT_TYPE,
    SIGNATURE_TYPE,
    ContentDescriptor,
    build_content,
    build_manifest,
    is_valid_id,
    parse_content,
    parse_manifest,
)
from encfs.format.suite import SUITES
from encfs.format.writer import VolumeOptions, VolumeWriter
from encfs.oci.blobs import MAX_MANIFEST_SIZE, Descriptor
from tests.support.memory import MemoryStore


def make_content(*, volumes: int = 1, hash_name: str = "blake3") -> ContentDescriptor:
    descriptors = []
    for _ in range(volumes):
        writer = VolumeWriter(MemoryStore(), VolumeOptions(suite=SUITES[hash_name], frame_size=4096))
        writer.write(bytes(10_000))
        descriptors.append(writer.finish().descriptor)
    return build_content(
        artifact_id="acme/model",
        version=7,
        created="2026-01-01T00:00:00Z",
        suite=SUITES[hash_name],
        payload_commitment=bytes(32),
        volumes=descriptors,
    )


@pytest.fixture(scope="module")
def content() -> ContentDescriptor:
    return make_content()


@pytest.mark.parametrize("hash_name", sorted(SUITES))
def test_round_trip_keeps_the_exact_bytes(hash_name: str) -> None:
    content = make_content(volumes=3, hash_name=hash_name)
    again = parse_content(content.content)
    assert again == content
    assert again.digest == sha256_digest(content.content)
    assert rfc8785.dumps(json.loads(content.content)) == content.content
    # Other bytes of the same meaning are another descriptor.
    spaced = json.dumps(json.loads(content.content)).encode()
    assert parse_content(spaced).digest != content.digest
    assert parse_content(spaced).volumes == content.volumes


Change = Callable[[dict[str, Any]], object]


def volume(change: Change) -> Change:
    return lambda document: change(document["volumes"][0])


def segment(change: Change) -> Change:
    return lambda document: change(document["volumes"][0]["segments"][0])


REFUSED: dict[str, Change] = {
    "unknown member": lambda d: d.update(more=1),
    "no id": lambda d: d.pop("id"),
    "empty id": lambda d: d.update(id=""),
    "id with a line end": lambda d: d.update(id="acme\n"),
    "id of 256": lambda d: d.update(id="a" * 256),
    "negative version": lambda d: d.update(version=-1),
    "version beyond 2^53": lambda d: d.update(version=2**53),
    "version as text": lambda d: d.update(version="7"),
    "version as truth": lambda d: d.update(version=True),
    "date without zone": lambda d: d.update(created="2026-01-01T00:00:00"),
    "commitment of another hash": lambda d: d.update(payload_commitment="sha512:" + "0" * 64),
    "upper-case commitment": lambda d: d.update(payload_commitment="sha256:" + "A" * 64),
    "no volumes": lambda d: d.update(volumes=[]),
    "volumes as object": lambda d: d.update(volumes={}),
    "513 volumes": lambda d: d.update(volumes=d["volumes"] * 513),
    "a volume twice": lambda d: d.update(volumes=d["volumes"] * 2),
    "suite as text": lambda d: d.update(suite="blake3"),
    "volume with unknown member": volume(lambda v: v.update(key="")),
    "kind that is unknown": volume(lambda v: v.update(kind="ext4")),
    "short id": volume(lambda v: v.update(id="00" * 15)),
    "upper-case root": volume(lambda v: v.update(root="AA" * 32)),
    "frame size not a power of two": volume(lambda v: v.update(frame_size=5000)),
    "frame size of 1": volume(lambda v: v.update(frame_size=1)),
    "frame size of 0": volume(lambda v: v.update(frame_size=0)),
    "frame size of 8 MiB": volume(lambda v: v.update(frame_size=8 << 20)),
    "one frame too many": volume(lambda v: v.update(frames=4)),
    "one byte too many": volume(lambda v: v.update(size=12_289)),
    "no bytes": volume(lambda v: v.update(size=0)),
    "too many frames": volume(lambda v: v.update(size=2**53 - 1, frames=-(-(2**53 - 1) // 4096))),
    "tree of another size": volume(lambda v: v["tree"].update(size=145)),
    "tree with unknown member": volume(lambda v: v["tree"].update(url="http://x")),
    "tree without digest": volume(lambda v: v["tree"].pop("digest")),
    "no segments": volume(lambda v: v.update(segments=[])),
    "a segment too many": volume(lambda v: v["segments"].append(dict(v["segments"][0]))),
    "segment without frames": segment(lambda s: s.update(frames=0)),
    "segment with fewer frames": segment(lambda s: s.update(frames=2)),
    "segment smaller than its frames": segment(lambda s: s.update(size=2)),
    "segment with unknown member": segment(lambda s: s.update(urls=[])),
    "segment with a bad digest": segment(lambda s: s.update(digest="sha256:" + "0" * 63)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_contradictions_are_refused(content: ContentDescriptor, what: str) -> None:
    document = json.loads(content.content)
    REFUSED[what](document)
    with pytest.raises(FormatError):
        parse_content(json.dumps(document).encode())


@pytest.mark.parametrize("name", ["format", "suite"])
def test_other_versions_and_suites_are_unsupported(content: ContentDescriptor, name: str) -> None:
    document = json.loads(content.content)
    document[name] = "encfs/2" if name == "format" else {"aead": "AES-256-GCM", "kdf": "HKDF-SHA256", "hash": "md5"}
    with pytest.raises(UnsupportedError) as caught:
        parse_content(json.dumps(document).encode())
    assert caught.value.hint


#: None: the member is missing.
REPLACEMENTS: tuple[object, ...] = (None, 0, "", [], {}, -1, 2**60, "x" * 300)


def test_every_member_missing_or_of_another_kind_is_refused(content: ContentDescriptor) -> None:
    def paths(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        if isinstance(value, dict):
            return [item for key in value for item in [(*path, key), *paths(value[key], (*path, key))]]
        if isinstance(value, list):
            return [item for at, child in enumerate(value) for item in paths(child, (*path, at))]
        return []

    document = json.loads(content.content)
    found = paths(document)
    assert len(found) > 20
    for path in found:
        for replacement in REPLACEMENTS:
            changed = copy.deepcopy(document)
            target: Any = changed
            for step in path[:-1]:
                target = target[step]
            if replacement is None:
                del target[path[-1]]
            elif target[path[-1]] == replacement:
                continue
            else:
                target[path[-1]] = replacement
            if path == ("version",) and replacement == 0:
                assert parse_content(json.dumps(changed).encode()).version == 0
                continue
            with pytest.raises(EncfsError):
                parse_content(json.dumps(changed).encode())


def test_sizes_are_bounded() -> None:
    with pytest.raises(FormatError):
        parse_content(b" " * (MAX_MANIFEST_SIZE + 1))
    with pytest.raises(FormatError):
        parse_manifest(b" " * (MAX_MANIFEST_SIZE + 1))


@pytest.mark.parametrize(
    ("text", "valid"),
    [("a", True), ("acme/model:v1@x+y-z._", True), ("-a", False), ("", False), ("ä", False), ("a b", False)],
)
def test_ids(text: str, valid: bool) -> None:
    assert is_valid_id(text) == valid


KEYRING = Descriptor(KEYRING_TYPE, sha256_digest(b"keyring"), 7)


def make_manifest(content: ContentDescriptor) -> dict[str, Any]:
    signatures = [Descriptor(SIGNATURE_TYPE, sha256_digest(b"signature"), 9)]
    document: dict[str, Any] = json.loads(build_manifest(content, KEYRING, signatures, {"title": "mine"}))
    return document


def test_manifest_round_trip(content: ContentDescriptor) -> None:
    manifest = parse_manifest(json.dumps(make_manifest(content)).encode())
    assert manifest.config.digest == content.digest
    assert manifest.keyring == KEYRING
    assert [item.size for item in manifest.signatures] == [9]
    assert manifest.annotations == {"title": "mine"}
    assert len(manifest.blobs) == 4


MANIFESTS: dict[str, tuple[type[EncfsError], Change]] = {
    "another schema": (UnsupportedError, lambda m: m.update(schemaVersion=1)),
    "another artifact": (UnsupportedError, lambda m: m.update(artifactType="application/vnd.acme")),
    "an image": (UnsupportedError, lambda m: m["config"].update(mediaType="application/vnd.oci.image.config.v1+json")),
    "no config": (UnsupportedError, lambda m: m.pop("config")),
    "no layers": (UnsupportedError, lambda m: m.pop("layers")),
    "no keyring": (FormatError, lambda m: m["layers"].pop(0)),
    "two keyrings": (FormatError, lambda m: m["layers"].append(m["layers"][0])),
    "17 signatures": (FormatError, lambda m: m["layers"].extend([m["layers"][1]] * MAX_SIGNATURES)),
    "too many layers": (
        FormatError,
        lambda m: m["layers"].extend([{"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 0}] * 65536),
    ),
    "layer as text": (FormatError, lambda m: m["layers"].append("x")),
    "layer without size": (FormatError, lambda m: m["layers"][2].pop("size")),
    "layer of negative size": (FormatError, lambda m: m["layers"][2].update(size=-1)),
    "layer of true size": (FormatError, lambda m: m["layers"][2].update(size=True)),
    "layer with a path for a digest": (FormatError, lambda m: m["layers"][2].update(digest="../../etc/passwd")),
    "annotations that are no text": (FormatError, lambda m: m.update(annotations={"a": 1})),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_are_refused(content: ContentDescriptor, what: str) -> None:
    kind, change = MANIFESTS[what]
    document = make_manifest(content)
    change(document)
    with pytest.raises(kind):
        parse_manifest(json.dumps(document).encode())


def test_a_manifest_that_lost_its_artifact_type_on_a_copy_is_read(content: ContentDescriptor) -> None:
    document = make_manifest(content)
    del document["artifactType"]
    assert parse_manifest(json.dumps(document).encode()).config.digest == content.digest


def test_more_blobs_than_fit_into_a_manifest_are_refused_on_writing(content: ContentDescriptor) -> None:
    signatures = [Descriptor(SEGMENT_TYPE, sha256_digest(b""), 0)] * 40_000
    with pytest.raises(UnsupportedError, match="segment-size"):
        build_manifest(content, KEYRING, signatures)
