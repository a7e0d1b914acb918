"""Hostile images of ocicrypt: a clear error, and nothing under the target's tag, nor any plaintext among its blobs."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import (
    ConflictError,
    EncfsError,
    FormatError,
    IntegrityError,
    MissingKeyError,
    UnsupportedError,
    UsageError,
    WrongKeyError,
)
from encfs.image.compression import Compression
from encfs.image.manifest import CONFIG_TYPE, INDEX_TYPE
from encfs.oci.layout import Layout
from imagetool.ocicrypt import layers, options
from imagetool.ocicrypt.images import DecryptOptions
from imagetool.ocicrypt.options import Element, Encryption, LayerKey, fresh_key, private_options
from imagetool.ocicrypt.schemes import open_layer
from tests.support.container_images import (
    KeyPair,
    Store,
    archive,
    descriptor_json,
    make_image,
    make_index,
    make_key,
    run_decrypt,
    run_encrypt,
)

PUBLIC = "org.opencontainers.image.enc.pubopts"
JWE = "org.opencontainers.image.enc.keys.jwe"
CONTENT = archive({"secret": os.urandom(2_500_000)})


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_key(tmp_path_factory.mktemp("keys"), "p256")


@pytest.fixture
def store(tmp_path: Path, key: KeyPair) -> Store:
    """Tag `plain`, and the same image encrypted as `good`."""
    store = Store(tmp_path / "store")
    make_image(store, "plain", [(CONTENT, Compression.NONE), (archive({"b": b"second"}), Compression.GZIP)])
    run_encrypt(store.reference("plain"), store.reference("good"), [key.public])
    return store


def refused(
    store: Store, reference: str, key: KeyPair, error: type[EncfsError], problem: str, **more: Any
) -> EncfsError:
    """Decrypting fails, and leaves nothing behind: no tag, no blob."""
    target = Store(store.path.parent / "target")
    with pytest.raises(error, match=problem) as caught:
        run_decrypt(reference, target.reference("x"), [key.private], **more)
    assert target.tags() == []
    assert target.blobs() == set()
    assert "\n" not in str(caught.value)
    return caught.value


def layer_change(index: int, change: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda document: change(document["layers"][index])


def annotated(name: str, value: str, index: int = 0) -> Callable[[dict[str, Any]], None]:
    return layer_change(index, lambda layer: layer["annotations"].update({name: value}))


def public(**members: object) -> str:
    document = {"cipher": options.CIPHER, "hmac": base64.b64encode(bytes(32)).decode(), "cipheroptions": {}} | members
    return base64.b64encode(json.dumps(document).encode()).decode()


def test_the_good_one_is_good(store: Store, key: KeyPair) -> None:
    run_decrypt(store.reference("good"), store.reference("back"), [key.private])
    assert store.plain_layers("back") == store.plain_layers("plain")
    assert store.manifest("back").document == store.manifest("plain").document


# -- ciphertext


@pytest.mark.parametrize("position", [0, 1_234_567, -1])
def test_an_altered_ciphertext(store: Store, key: KeyPair, position: int) -> None:
    def alter(layer: dict[str, Any]) -> None:
        content = bytearray(store.blob(layer["digest"]))
        content[position] ^= 1
        layer.update(descriptor_json(store.add(bytes(content), layer["mediaType"])))

    reference = store.change("good", layer_change(0, alter))
    refused(store, reference, key, IntegrityError, "layer 0 was altered: its HMAC is wrong")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 2_000_000])
def test_a_ciphertext_that_is_cut(store: Store, key: KeyPair, size: int) -> None:
    def cut(layer: dict[str, Any]) -> None:
        layer.update(descriptor_json(store.add(store.blob(layer["digest"])[:size], layer["mediaType"])))

    refused(store, store.change("good", layer_change(0, cut)), key, IntegrityError, "HMAC is wrong")


def test_a_blob_that_is_not_what_its_digest_says(store: Store, key: KeyPair) -> None:
    layer = store.manifest("good").layers[0]
    path = store.path / "blobs" / layer.digest.replace(":", "/")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    refused(store, store.reference("good"), key, IntegrityError, "HMAC is wrong")
    path.write_bytes(content[:-1])
    refused(store, store.reference("good"), key, IntegrityError, "not 2")


def test_no_plaintext_comes_before_the_mac_is_checked(
    store: Store, key: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wrong MAC nothing is decrypted at all."""
    started: list[object] = []
    monkeypatch.setattr(layers, "decrypted", lambda *arguments: started.append(arguments) or iter(()))
    reference = store.change("good", annotated(PUBLIC, public()))
    refused(store, reference, key, IntegrityError, "HMAC is wrong")
    assert started == []


def test_a_file_that_changes_between_the_check_and_the_use(
    store: Store, key: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = store.manifest("good").layers[0]
    path = store.path / "blobs" / layer.digest.replace(":", "/")
    check = layers.check_mac

    def check_and_change(*arguments: Any) -> bytes:
        checked = check(*arguments)
        content = bytearray(path.read_bytes())
        content[2_000_000] ^= 1
        path.write_bytes(content)
        return checked

    monkeypatch.setattr(layers, "check_mac", check_and_change)
    refused(store, store.reference("good"), key, IntegrityError, "layer 0 changed while it was read")


# -- public options


def test_a_nonce_in_the_public_options(store: Store, key: KeyPair) -> None:
    """Other readers take it, and write a wrong plaintext without a word."""
    mac = json.loads(base64.b64decode(store.manifest("good").layers[0].annotations[PUBLIC]))["hmac"]
    nonce = {"nonce": base64.b64encode(bytes(16)).decode()}
    reference = store.change("good", annotated(PUBLIC, public(hmac=mac, cipheroptions=nonce)))
    error = refused(store, reference, key, FormatError, "public options of layer 0 hold cipher options")
    assert error.hint is not None


@pytest.mark.parametrize(
    ("value", "error", "problem"),
    [
        (public(cipher="AES_128_CTR"), UnsupportedError, "name the cipher 'AES_128_CTR'"),
        (public(cipher=None), UnsupportedError, "name the cipher None"),
        (public(hmac=""), FormatError, "HMAC of 0 bytes"),
        (public(hmac=base64.b64encode(bytes(31)).decode()), FormatError, "HMAC of 31 bytes"),
        (public(hmac=None), FormatError, "not canonical base64"),
        (public(more=1), FormatError, "unknown member 'more'"),
        (public(cipheroptions=[]), FormatError, "cipher options"),
        ("!", FormatError, "not canonical base64"),
        ("", FormatError, "not JSON"),
        (base64.b64encode(b"[]").decode(), FormatError, "not a JSON object"),
        (base64.b64encode(b'{"hmac":"","hmac":""}').decode(), FormatError, "repeats the member"),
        (base64.b64encode(bytes(1 << 20)).decode(), FormatError, "larger than 8192 bytes"),
    ],
)
def test_malformed_public_options(
    store: Store, key: KeyPair, value: str, error: type[EncfsError], problem: str
) -> None:
    refused(store, store.change("good", annotated(PUBLIC, value)), key, error, problem)


def test_no_public_options(store: Store, key: KeyPair) -> None:
    reference = store.change("good", layer_change(0, lambda layer: layer["annotations"].pop(PUBLIC)))
    refused(store, reference, key, FormatError, "layer 0 has no annotation")


def test_an_unknown_annotation_about_encryption(store: Store, key: KeyPair) -> None:
    reference = store.change("good", annotated("org.opencontainers.image.enc.more", ""))
    refused(store, reference, key, FormatError, "unknown annotation")


# -- wrapped keys


@pytest.mark.parametrize(
    ("value", "error", "problem"),
    [
        ("no base64", FormatError, "not canonical base64"),
        ("", FormatError, "is not JSON"),
        (",", FormatError, "is not JSON"),
        (base64.b64encode(b"{}").decode(), FormatError, "not canonical base64url"),
        (base64.b64encode(bytes(600 << 10)).decode(), FormatError, "above 262144 bytes"),
        (",".join(["AAAA"] * 65), FormatError, "more than 64 elements"),
    ],
)
def test_malformed_wrapped_keys(store: Store, key: KeyPair, value: str, error: type[EncfsError], problem: str) -> None:
    refused(store, store.change("good", annotated(JWE, value)), key, error, problem)


def test_too_many_wrapped_keys_over_all_schemes(store: Store, key: KeyPair) -> None:
    text = ",".join(["AAAA"] * 40)
    name = "org.opencontainers.image.enc.keys.provider.a"
    reference = store.change(
        "good", layer_change(0, lambda layer: layer["annotations"].update({JWE: text, name: text}))
    )
    refused(store, reference, key, FormatError, "80 wrapped keys")


def test_a_key_that_is_not_a_recipients(store: Store, key: KeyPair, tmp_path: Path) -> None:
    for kind, problem in (("p256", "opens none of 1 JWE recipients"), ("rsa", "is for RSA-OAEP or RSA-OAEP-256")):
        refused(store, store.reference("good"), make_key(tmp_path, kind), WrongKeyError, problem)
    target = Store(tmp_path / "target")
    with pytest.raises(MissingKeyError):
        run_decrypt(store.reference("good"), target.reference("x"), [])


def test_a_good_element_behind_bad_ones_opens(store: Store, key: KeyPair) -> None:
    good = store.manifest("good").layers[0].annotations[JWE]
    reference = store.change("good", annotated(JWE, f"AAAA,{good}"))
    run_decrypt(reference, store.reference("back"), [key.private])
    assert store.plain_layers("back") == store.plain_layers("plain")


class _Plain:
    """A recipient and key that wraps nothing: for private options that no honest writer makes."""

    scheme = "plain"
    name = "plain"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def handles(self, scheme: str) -> bool:
        return scheme == self.scheme

    def unwrap(self, element: Element) -> bytearray:
        return bytearray(self.content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"cipheroptions": {"nonce": base64.b64encode(bytes(15)).decode()}}, "nonce of 15 bytes"),
        ({"cipheroptions": {"nonce": base64.b64encode(bytes(17)).decode()}}, "nonce of 17 bytes"),
        ({"cipheroptions": {}}, "exactly a nonce"),
        ({"cipheroptions": {"nonce": "", "more": ""}}, "exactly a nonce"),
        ({"symkey": base64.b64encode(bytes(16)).decode()}, "key of 16 bytes"),
        ({"symkey": None}, "not canonical base64"),
        ({"digest": 1}, "digest that is no text"),
        ({"more": 1}, "unknown member"),
    ],
)
def test_malformed_private_options(change: dict[str, object], problem: str) -> None:
    document = json.loads(private_options(fresh_key(), "sha256:00"))
    opener = _Plain(json.dumps(document | change).encode())
    with pytest.raises(FormatError, match=problem):
        open_layer(Encryption(bytes(32), (Element("plain", b""),)), [opener], "layer 0")  # type: ignore[list-item]


def test_keys_are_in_no_repr() -> None:
    key = LayerKey(bytearray(b"S" * 32), bytes(16))
    assert "SSS" not in repr(key)
    key.wipe()
    assert key.secret == bytes(32)
    assert dataclasses.fields(LayerKey)[0].repr is False


# -- what is in the layer


def test_a_layer_that_is_not_the_configs(tmp_path: Path, key: KeyPair) -> None:
    for compression in Compression:
        store = Store(tmp_path / f"of-{compression.value}")
        wrong = [f"sha256:{hashlib.sha256(b'another').hexdigest()}"]
        make_image(store, "plain", [(CONTENT, compression)], diff_ids=wrong)
        run_encrypt(store.reference("plain"), store.reference("good"), [key.public])
        refused(store, store.reference("good"), key, IntegrityError, "layer 0 is not the one .* its diff ID is sha256:")


def test_as_many_diff_ids_as_layers(store: Store, key: KeyPair) -> None:
    def drop(document: dict[str, Any]) -> None:
        config = json.loads(store.blob(document["config"]["digest"]))
        config["rootfs"]["diff_ids"].pop()
        document["config"] = descriptor_json(store.add(json.dumps(config).encode(), CONFIG_TYPE))

    refused(store, store.change("good", drop), key, FormatError, "2 layers, and its config 1")


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD])
def test_a_bomb(tmp_path: Path, key: KeyPair, compression: Compression) -> None:
    store = Store(tmp_path / "store")
    make_image(store, "plain", [(archive({"zeros": bytes(20 << 20)}), compression)])
    run_encrypt(store.reference("plain"), store.reference("good"), [key.public])
    error = refused(
        *(store, store.reference("good"), key, FormatError, "layer 0 decompresses to more than 10 MiB"),
        options=DecryptOptions(maximum=10 << 20),
    )
    assert error.hint is not None


@pytest.mark.parametrize("content", [gzip.compress(CONTENT)[:-9], b"no gzip", b""])
def test_a_layer_that_is_no_gzip(tmp_path: Path, key: KeyPair, content: bytes) -> None:
    store = Store(tmp_path / "store")
    make_image(store, "plain", [(CONTENT, Compression.GZIP)])
    blob = store.add(content, "application/vnd.oci.image.layer.v1.tar+gzip")
    broken = store.change("plain", lambda document: document["layers"][0].update(descriptor_json(blob)))
    run_encrypt(broken, store.reference("good"), [key.public])
    refused(store, store.reference("good"), key, FormatError, "layer 0 (is no sound gzip|ends in the middle)")


def test_a_layer_of_an_unknown_type_in_an_image(store: Store, key: KeyPair) -> None:
    reference = store.change("good", layer_change(0, lambda layer: layer.update(mediaType="application/x+encrypted")))
    refused(store, reference, key, UnsupportedError, "'application/x', which cannot be checked")


# -- manifests and indexes


def test_a_second_layer_that_fails_takes_the_first_one_back(store: Store, key: KeyPair) -> None:
    reference = store.change("good", annotated(PUBLIC, public(), index=1))
    refused(store, reference, key, IntegrityError, "layer 1 was altered")


def test_an_index_in_an_index_and_a_circle(store: Store, key: KeyPair) -> None:
    for name in ("one", "two"):
        entry = descriptor_json(store.add(b"{}", INDEX_TYPE))
        store.put({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}, name)
        refused(store, store.reference(name), key, UnsupportedError, "another index in it")


def test_a_huge_manifest(store: Store, key: KeyPair) -> None:
    def grow(document: dict[str, Any]) -> None:
        document["annotations"]["huge"] = "x" * (4 << 20)

    refused(store, store.change("good", grow), key, FormatError, "more than the 4194304 allowed")


def test_what_cannot_be_encrypted_again_or_at_all(store: Store, key: KeyPair, tmp_path: Path) -> None:
    target = Store(tmp_path / "target")
    for reference, error, problem, chosen in (
        (store.reference("good"), ConflictError, "layer 0 is encrypted already", []),
        (store.reference("plain"), UsageError, "no layer 2", [2]),
        (store.reference("plain"), UsageError, "no layer -3", [-3]),
        (
            store.change("plain", layer_change(0, lambda layer: layer.update(mediaType="application/x"))),
            UnsupportedError,
            "type 'application/x'",
            [],
        ),
    ):
        with pytest.raises(error, match=problem):
            run_encrypt(reference, target.reference("x"), [key.public], layers=chosen)
    assert target.tags() == []
    refused(store, store.reference("plain"), key, ConflictError, "no layer of the image is encrypted")


def test_a_source_that_is_damaged_is_not_encrypted(store: Store, key: KeyPair, tmp_path: Path) -> None:
    layer = store.manifest("plain").layers[0]
    path = store.path / "blobs" / layer.digest.replace(":", "/")
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    target = Store(tmp_path / "target")
    with pytest.raises(IntegrityError, match="layer 0 has other content"):
        run_encrypt(store.reference("plain"), target.reference("x"), [key.public])
    assert target.tags() == []
    assert target.blobs() == set()


def test_an_index_keeps_its_platforms(tmp_path: Path, key: KeyPair) -> None:
    store = Store(tmp_path / "store")
    content = {
        "amd64": [(archive({"a": b"amd64"}), Compression.NONE)],
        "arm64": [(archive({"a": b"arm64"}), Compression.GZIP)],
    }
    make_index(store, "multi", content)
    result = run_encrypt(store.reference("multi"), store.reference("secret"), [key.public])
    assert (result.images, result.layers, result.dropped) == (2, 2, 1)
    back = run_decrypt(store.reference("secret"), store.reference("back"), [key.private])
    assert (back.images, back.layers, back.dropped) == (2, 2, 0)
    with closing(Layout(store.path)) as layout:
        before, after = (json.loads(layout.document(tag).content) for tag in ("multi", "back"))
        secret = json.loads(layout.document("secret").content)
    assert after["manifests"] == before["manifests"][:2]
    assert "attestation" not in json.dumps(secret), "it would tell about the plain image"
    assert not any(entry.get("artifactType") for entry in secret["manifests"])
