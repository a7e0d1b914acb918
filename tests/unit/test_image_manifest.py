"""Manifests and indexes of images: what is read, what is kept when they are written again, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from encfs.encoding import sha256_digest
from encfs.errors import EncfsError, FormatError, UnsupportedError, UsageError
from encfs.image.manifest import (
    CONFIG_TYPE,
    DOCKER_CONFIG_TYPE,
    DOCKER_MANIFEST_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    ImageIndex,
    ImageManifest,
    Platform,
    chosen_entries,
    parse_image,
    parse_image_index,
    parse_image_manifest,
    parse_platform,
)
from encfs.oci.blobs import RawManifest

_LAYER = "application/vnd.oci.image.layer.v1.tar"


def _descriptor(media_type: str, name: str, **members: object) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": sha256_digest(name.encode()), "size": len(name), **members}


def _manifest(**members: object) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _descriptor(CONFIG_TYPE, "config"),
        "layers": [
            _descriptor(
                _LAYER, "one", annotations={"a": "b"}, data="b25l", urls=["https://example.org/one"], other=[1]
            ),
            _descriptor(_LAYER, "two", other={"kept": True}),
        ],
        "annotations": {"title": "äöü"},
        "subject": _descriptor(MANIFEST_TYPE, "subject"),
        **members,
    }


def _index(**members: object) -> dict[str, Any]:
    def entry(name: str, platform: object, **more: object) -> dict[str, Any]:
        return _descriptor(MANIFEST_TYPE, name, platform=platform, **more)

    return {
        "schemaVersion": 2,
        "mediaType": INDEX_TYPE,
        "manifests": [
            entry("amd64", {"os": "linux", "architecture": "amd64"}),
            entry("arm64", {"os": "linux", "architecture": "arm64", "variant": "v8"}, annotations={"kept": "too"}),
            entry(
                "attestation",
                {"os": "unknown", "architecture": "unknown"},
                annotations={"vnd.docker.reference.type": "attestation-manifest"},
            ),
        ],
        **members,
    }


def _raw(document: object) -> bytes:
    return json.dumps(document).encode()


def test_a_manifest_is_read() -> None:
    content = _raw(_manifest())
    manifest = parse_image(RawManifest(content, sha256_digest(content), MANIFEST_TYPE))
    assert isinstance(manifest, ImageManifest)
    assert manifest.config.media_type == CONFIG_TYPE
    assert [layer.size for layer in manifest.layers] == [3, 3]
    assert manifest.layers[0].annotations == {"a": "b"}


def test_rewriting_keeps_what_is_not_replaced() -> None:
    before = _manifest()
    manifest = parse_image_manifest(_raw(before), MANIFEST_TYPE)
    changed = replace(manifest.layers[0], digest=sha256_digest(b"new"), size=17, annotations={"c": "d"})
    after = json.loads(manifest.rewritten([changed, manifest.layers[1]]))
    assert after["layers"][0] == {
        "mediaType": _LAYER,
        "digest": sha256_digest(b"new"),
        "size": 17,
        "annotations": {"c": "d"},
        "other": [1],
    }, "the old bytes are neither embedded nor linked to"
    assert after | {"layers": before["layers"]} == before
    assert after["layers"][1] == before["layers"][1]


def test_dockers_types_become_ocis() -> None:
    document = _manifest(mediaType=DOCKER_MANIFEST_TYPE, config=_descriptor(DOCKER_CONFIG_TYPE, "config"))
    manifest = parse_image_manifest(_raw(document), DOCKER_MANIFEST_TYPE)
    after = json.loads(manifest.rewritten(manifest.layers))
    assert after["mediaType"] == MANIFEST_TYPE
    assert after["config"] == _descriptor(CONFIG_TYPE, "config")


def test_an_index_is_read_and_rewritten() -> None:
    content = _raw(_index())
    index = parse_image(RawManifest(content, sha256_digest(content), INDEX_TYPE))
    assert isinstance(index, ImageIndex)
    assert [str(entry.platform) for entry in index.entries] == ["linux/amd64", "linux/arm64/v8", "unknown/unknown"]
    assert [str(entry.platform) for entry in chosen_entries(index, [])] == ["linux/amd64", "linux/arm64/v8"]
    (chosen,) = chosen_entries(index, [parse_platform("linux/arm64")])
    after = json.loads(
        index.rewritten({chosen.descriptor.digest: replace(chosen.descriptor, digest=sha256_digest(b"x"), size=1)})
    )
    (entry,) = after["manifests"]
    assert entry["digest"] == sha256_digest(b"x")
    assert entry["platform"] == {"os": "linux", "architecture": "arm64", "variant": "v8"}
    assert entry["annotations"] == {"kept": "too"}
    with pytest.raises(UsageError, match="not for linux/s390x") as caught:
        chosen_entries(index, [parse_platform("linux/s390x")])
    assert caught.value.hint == "it is for linux/amd64, linux/arm64/v8"


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (_manifest(manifests=[]), "belongs to another kind"),
        (_manifest(schemaVersion=1), "schema version"),
        (_manifest(mediaType=DOCKER_MANIFEST_TYPE), "says to be"),
        (_manifest(layers={}), "no list"),
        (_manifest(layers=[_descriptor(_LAYER, "x")] * 513), "at most 512 layers"),
        (_manifest(layers=["x"]), "layer 0 is not a JSON object"),
        (_manifest(layers=[_descriptor(_LAYER, "x", size=-1)]), "no size"),
        (_manifest(layers=[_descriptor(_LAYER, "x", size=True)]), "no size"),
        (_manifest(layers=[_descriptor(_LAYER, "x", digest="md5:00")]), "digest in the descriptor of layer 0"),
        (_manifest(layers=[_descriptor(_LAYER, "x", annotations={"a": 1})]), "annotations that are not texts"),
        (_manifest(layers=[_descriptor(_LAYER, "x", annotations=[])]), "annotations that are not texts"),
        (_manifest(layers=[_descriptor("", "x")]), "no media type"),
        (_manifest(config=None), "config descriptor is not"),
    ],
)
def test_malformed_manifests_are_refused(document: object, problem: str) -> None:
    with pytest.raises(EncfsError, match=problem):
        parse_image_manifest(_raw(document), MANIFEST_TYPE)


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (_index(layers=[]), "belongs to another kind"),
        (_index(manifests=None), "no list"),
        (_index(manifests=[_descriptor(MANIFEST_TYPE, "x", platform=[])]), "platform that is no JSON object"),
        (_index(manifests=[_descriptor(MANIFEST_TYPE, "x", platform={"os": 1})]), "not made of texts"),
    ],
)
def test_malformed_indexes_are_refused(document: object, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        parse_image_index(_raw(document), INDEX_TYPE)


def test_other_documents_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="no manifest"):
        parse_image_manifest(_raw(_manifest()), "text/html")
    with pytest.raises(FormatError, match="more than the"):
        parse_image_manifest(b" " * (4 << 20) + _raw(_manifest()), MANIFEST_TYPE)


@pytest.mark.parametrize("text", ["", "linux", "linux/", "a/b/c/d", "linux/am d64", "linux/\x1b"])
def test_malformed_platforms_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_platform(text)


def test_platforms_match() -> None:
    assert Platform("linux", "arm", "v7").matches(parse_platform("linux/arm"))
    assert not Platform("linux", "arm", "v7").matches(parse_platform("linux/arm/v6"))
    assert not Platform("linux", "arm").matches(parse_platform("linux/amd64"))
