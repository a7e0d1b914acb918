"""`imagetool convert`: from ocicrypt to artifacts that are read lazily, and back, with no plain layer on any disk."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import IntegrityError
from encfs.image.compression import Compression
from encfs.keys.files import load_recipient_key
from encfs.oci.layout import Layout
from encfs.progress import NoProgress
from imagetool.ocicrypt.conversion import DecryptingSource
from imagetool.ocicrypt.keys import parse_opener
from imagetool.pipeline.encrypt_image import ImageOptions, encrypt_images
from imagetool.sources.stored import load_images
from tests.integration.test_registry_commands import answer, run
from tests.support.container_images import Store, archive, make_image, make_index, make_key, run_encrypt, skopeo_copy
from tests.support.documented import assert_as_documented

MARKER = b"a marker that is in the plain layer only, and that nobody else writes"
LAYERS = [
    (archive({"a/marker": MARKER * 50_000}), Compression.NONE),
    (archive({"b": random.Random(5).randbytes(300_000)}), Compression.GZIP),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """`oci:store:plain`, the same encrypted as `oci:secret:x`, and keys of both worlds."""
    make_key(tmp_path, "p256")
    run(tmp_path, "imagetool", "keygen", "-o", "alice.jwk")
    store = Store(tmp_path / "store")
    make_image(store, "plain", LAYERS)
    run_encrypt(store.reference("plain"), f"oci:{tmp_path}/secret:x", [tmp_path / "p256.pub.pem"])
    return tmp_path


def convert(place: Path, *words: str) -> dict[str, Any]:
    return answer(place, "convert", *words)


def _assert_same(place: Path, layout: str, tag: str) -> None:
    before, after = Store(place / "store"), Store(place / layout)
    assert after.manifest(tag).config.digest == before.manifest("plain").config.digest
    assert _plain(after, tag) == [content for content, _ in LAYERS]


def _plain(store: Store, tag: str) -> list[bytes]:
    import gzip

    return [
        gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content for content in store.plain_layers(tag)
    ]


def test_there_and_back(place: Path) -> None:
    made = convert(place, "oci:secret:x", "oci:art:x", "-k", "p256.pem", "-r", "alice.jwk.pub", "--id", "example")
    assert_as_documented("imagetool convert", made)
    assert (made["format"], made["images"][0]["platform"], made["images"][0]["layers"]) == ("encfs", "linux/amd64", 2)
    pin = ("--pin", made["images"][0]["content_digest"])
    assert run(place, "encfs", "cat", "oci:art:x", "/a/marker", "-k", "alice.jwk", *pin).encode() == MARKER * 50_000
    back = convert(place, "oci:art:x", "oci:back:x", "-k", "alice.jwk", "-r", "p256.pub.pem", *pin)
    assert (back["format"], back["images"]) == (
        "ocicrypt",
        [{"platform": "linux/amd64", "layers": 2, "content_digest": None}],
    )
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:back:x", "oci:ours:x", "-k", "p256.pem")
    _assert_same(place, "ours", "x")


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_what_skopeo_encrypted_and_what_it_decrypts(place: Path) -> None:
    skopeo_copy(
        f"oci:{place}/store:plain", f"oci:{place}/theirs:x", "--encryption-key", f"jwe:{place / 'p256.pub.pem'}"
    )
    convert(place, "oci:theirs:x", "oci:art:x", "-k", "p256.pem", "-r", "alice.jwk.pub")
    words = ("oci:art:x", "oci:back:x", "-k", "alice.jwk", "-r", "p256.pub.pem", "--allow-unsigned")
    convert(place, *words, "--layer-compression", "none")
    skopeo_copy(f"oci:{place}/back:x", f"oci:{place}/plain:x", "--decryption-key", place / "p256.pem")
    _assert_same(place, "plain", "x")


def test_indexes(place: Path) -> None:
    store = Store(place / "store")
    make_index(store, "multi", {"amd64": LAYERS[:1], "arm64": LAYERS})
    run_encrypt(store.reference("multi"), f"oci:{place}/secret:multi", [place / "p256.pub.pem"])
    made = convert(place, "oci:secret:multi", "oci:art:multi", "-k", "p256.pem", "-r", "alice.jwk.pub")
    assert [image["platform"] for image in made["images"]] == ["linux/amd64", "linux/arm64"]
    words = ("oci:art:multi", "oci:back:x", "-k", "alice.jwk", "-r", "p256.pub.pem", "--allow-unsigned")
    back = convert(place, *words, "--platform", "linux/arm64")
    assert back["images"][0]["platform"] == "linux/arm64"
    assert back["images"][0]["layers"] == 2


def test_no_plain_layer_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither to what is kept nor to a temporary file."""
    written: list[int] = []
    write = os.write

    def watched(file: int, data: Any) -> int:
        content = bytes(data)
        assert MARKER not in content
        written.append(len(content))
        return write(file, data)

    monkeypatch.setattr(os, "write", watched)
    with (
        closing(Layout(place / "secret", tag="x")) as origin,
        closing(DecryptingSource(origin, [parse_opener(str(place / "p256.pem"))])) as source,
        closing(Layout(place / "art", tag="x", create=True)) as sink,
    ):
        images = load_images(source)
        encrypt_images(
            *(images, sink, [load_recipient_key(place / "alice.jwk.pub")]),
            options=ImageOptions(),
            tag="x",
            progress=NoProgress(),
        )
        assert b"marker" not in repr(source).encode()
    assert sum(written) > 300_000
    monkeypatch.undo()
    back = ("oci:art:x", "oci:back:x", "-k", "alice.jwk", "-r", "p256.pub.pem", "--allow-unsigned")
    convert(place, *back, "--layer-compression", "none")
    for path in _files(place):
        if "store" not in path.parts:
            assert MARKER not in path.read_bytes(), path


def _files(place: Path) -> Iterator[Path]:
    for path in place.rglob("*"):
        if path.is_file():
            yield path


def test_hostile_images_leave_nothing(place: Path) -> None:
    secret = Store(place / "secret")

    def alter(layer: dict[str, Any]) -> None:
        content = bytearray(secret.blob(layer["digest"]))
        content[1_000_000] ^= 1
        blob = secret.add(bytes(content), layer["mediaType"])
        layer |= {"digest": blob.digest, "size": blob.size}

    secret.change("x", lambda document: alter(document["layers"][0]), new_tag="altered")
    words = ("-k", "p256.pem", "-r", "alice.jwk.pub")
    message = run(place, "imagetool", "convert", "oci:secret:altered", "oci:art:x", *words, code=11)
    assert "layer 0 was altered: its HMAC is wrong" in message
    assert Store(place / "art").tags() == []
    assert Store(place / "art").blobs() == set()
    wrong = Store(place / "wrong")
    make_image(wrong, "plain", LAYERS[:1], diff_ids=["sha256:" + "0" * 64])
    run_encrypt(wrong.reference("plain"), wrong.reference("x"), [place / "p256.pub.pem"])
    message = run(place, "imagetool", "convert", "oci:wrong:x", "oci:art:x", *words, code=11)
    assert "not what the image's config says" in message
    assert Store(place / "art").tags() == []


def test_nothing_is_read_before_the_mac_is_right(place: Path) -> None:
    """The tar reader never sees a byte of a layer that was altered."""
    secret = Store(place / "secret")
    layer = secret.manifest("x").layers[0]
    path = secret.path / "blobs" / layer.digest.replace(":", "/")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with (
        closing(Layout(secret.path, tag="x")) as origin,
        closing(DecryptingSource(origin, [parse_opener(str(place / "p256.pem"))])) as source,
    ):
        images = load_images(source)
        with pytest.raises(IntegrityError, match="HMAC"):
            next(images.images[0].layers[0].read())


def test_other_wishes_are_refused(place: Path) -> None:
    convert(place, "oci:secret:x", "oci:art:x", "-k", "p256.pem", "-r", "alice.jwk.pub")
    artifact = ("convert", "oci:art:x", "oci:no:x", "-k", "alice.jwk", "-r", "p256.pub.pem")
    image = ("convert", "oci:secret:x", "oci:no:x", "-k", "p256.pem", "-r", "alice.jwk.pub")
    for words, code, problem in (
        ((*artifact, "--artifact-version", "3"), 2, "an ocicrypt image comes of it"),
        (artifact, 30, "nothing was given that proves the artifact's origin"),
        ((*artifact, "--allow-unsigned", "--platform", "a/b", "--platform", "c/d"), 2, "one platform at a time"),
        ((*image, "--allow-unsigned"), 2, "nothing proves where it is from"),
        ((*image, "--layer-compression", "none"), 2, "for the other way"),
        (image[:3], 21, "no key was given"),
        (image[:5], 21, "no recipient was given"),
        (("convert", "oci:store:plain", "oci:no:x", *image[3:]), 4, "no layer of the image is encrypted"),
    ):
        assert problem in run(place, "imagetool", *words, code=code), words
    assert not (place / "no").exists() or Store(place / "no").tags() == []
    assert len(json.loads((place / "art" / "index.json").read_text())["manifests"]) == 1
