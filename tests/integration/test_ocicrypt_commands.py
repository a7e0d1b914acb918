"""The commands of `imagetool ocicrypt` as a user runs them, on layouts and on a real registry."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encfs.image.compression import Compression
from tests.integration.test_registry_commands import answer, run
from tests.support.container_images import Store, archive, make_image, make_index, make_key, skopeo
from tests.support.documented import assert_as_documented
from tests.support.registry import DockerRegistry
from tests.support.remote import needs_docker_registry, running

LAYERS = [(archive({"a": b"one" * 1000}), Compression.NONE), (archive({"b": b"two"}), Compression.GZIP)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Keys of two recipients, and the images `oci:store:plain` and `oci:store:multi`."""
    for kind in ("p256", "rsa"):
        make_key(tmp_path, kind)
    store = Store(tmp_path / "store")
    make_image(store, "plain", LAYERS)
    make_index(store, "multi", {"amd64": LAYERS, "arm64": LAYERS[:1]})
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("registry"), delete=True) as server:
        yield server


def ocicrypt(place: Path, *words: str) -> dict[str, Any]:
    return answer(place, "ocicrypt", *words)


def test_there_and_back(place: Path) -> None:
    made = ocicrypt(place, "encrypt", "oci:store:plain", "oci:secret:v1", "-r", "p256.pub.pem")
    assert_as_documented("imagetool ocicrypt encrypt", made)
    assert (made["images"], made["layers"]) == (1, 2)
    listed = ocicrypt(place, "recipients", "list", "oci:secret:v1")
    assert_as_documented("imagetool ocicrypt recipients list", listed)
    (image,) = listed["images"]
    assert image["digest"] == made["manifest_digest"]
    assert image["layers"][0]["recipients"] == [{"number": 0, "scheme": "jwe", "description": "ECDH-ES+A256KW P-256"}]
    back = ocicrypt(place, "decrypt", "oci:secret:v1", "oci:back:v1", "-k", "p256.pem")
    assert_as_documented("imagetool ocicrypt decrypt", back)
    assert Store(place / "back").plain_layers("v1") == Store(place / "store").plain_layers("plain")


def test_recipients_come_and_go_without_touching_a_layer(place: Path) -> None:
    store = Store(place / "secret")
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:v1", "-r", "p256.pub.pem")
    layers = [(layer.digest, layer.media_type) for layer in store.manifest("v1").layers]
    added = ocicrypt(place, "recipients", "add", "oci:secret:v1", "-r", "rsa.pub.pem", "-k", "p256.pem")
    assert_as_documented("imagetool ocicrypt recipients add", added)
    for key in ("p256.pem", "rsa.pem"):
        run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v1", f"oci:back-{key}:v1", "-k", key)
    removed = ocicrypt(place, "recipients", "remove", "oci:secret:v1", "0")
    assert_as_documented("imagetool ocicrypt recipients remove", removed)
    assert "may have kept" in removed["warnings"][0]
    assert [(layer.digest, layer.media_type) for layer in store.manifest("v1").layers] == layers
    (image,) = ocicrypt(place, "recipients", "list", "oci:secret:v1")["images"]
    assert [one["description"] for one in image["layers"][1]["recipients"]] == ["RSA-OAEP"]
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v1", "oci:last:v1", "-k", "rsa.pem")
    message = run(*(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v1", "oci:no:v1", "-k", "p256.pem"), code=22)
    assert "no key opens layer 0 (encrypted for jwe)" in message
    assert "the last recipient of layer 0" in run(
        *(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:secret:v1", "jwe"), code=2
    )
    assert "no recipient 7" in run(
        *(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:secret:v1", "7"), code=3
    )
    assert "no layer of the image is encrypted" in run(
        *(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:store:plain", "0"), code=4
    )


def test_a_number_must_mean_the_same_in_all_layers(place: Path) -> None:
    words = ("oci:store:plain", "oci:secret:v1", "-r")
    run(place, "imagetool", "ocicrypt", "encrypt", *words, "p256.pub.pem", "--layer", "0")
    words = ("oci:secret:v1", "oci:secret:v2", "-r")
    run(place, "imagetool", "ocicrypt", "encrypt", *words, "rsa.pub.pem", "--layer", "1")
    both = ("-k", "p256.pem", "-k", "rsa.pem")
    run(place, "imagetool", "ocicrypt", "recipients", "add", "oci:secret:v2", "-r", "rsa.pub.pem", *both)
    message = run(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:secret:v2", "0", code=4)
    assert "recipient 0 is not the same in all layers" in message
    run(place, "imagetool", "ocicrypt", "recipients", "remove", "oci:secret:v2", "0", "--layer", "0")
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v2", "oci:back:v1", "-k", "rsa.pem")
    assert Store(place / "back").plain_layers("v1") == Store(place / "store").plain_layers("plain")


def test_platforms(place: Path) -> None:
    one = ocicrypt(
        place, *("encrypt", "oci:store:multi", "oci:secret:arm", "-r", "p256.pub.pem", "--platform", "linux/arm64")
    )
    assert (one["images"], one["layers"]) == (1, 1)
    all_of_them = ocicrypt(place, "encrypt", "oci:store:multi", "oci:secret:all", "-r", "p256.pub.pem")
    assert (all_of_them["images"], all_of_them["layers"]) == (2, 3)
    assert "1 attestations were left out" in all_of_them["warnings"][0]
    listed = ocicrypt(place, "recipients", "list", "oci:secret:all")
    assert [image["platform"] for image in listed["images"]] == ["linux/amd64", "linux/arm64"]
    added = ocicrypt(place, "recipients", "add", "oci:secret:all", "-r", "rsa.pub.pem", "-k", "p256.pem")
    assert (added["images"], added["layers"]) == (2, 3)
    words = ("decrypt", "oci:secret:all", "oci:back:amd", "-k", "rsa.pem", "--platform", "linux/amd64")
    assert ocicrypt(place, *words)["images"] == 1
    assert Store(place / "back").plain_layers("amd") == Store(place / "store").plain_layers("multi-amd64")
    for words, problem in (
        (("encrypt", "oci:store:multi", "oci:no:x", "-r", "rsa.pub.pem", "--platform", "linux/s390x"), "not for linux"),
        (("encrypt", "oci:store:plain", "oci:no:x", "-r", "rsa.pub.pem", "--platform", "linux/arm64"), "amd64 alone"),
    ):
        assert problem in run(place, "imagetool", "ocicrypt", *words, code=2)


@needs_docker_registry
def test_registries(place: Path, server: DockerRegistry) -> None:
    place_in_registry = f"docker://{server.host}/images"
    words = ("--plain-http", "-r", "p256.pub.pem")
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:multi", f"{place_in_registry}:all", *words)
    run(
        *(place, "imagetool", "ocicrypt", "recipients", "add", f"{place_in_registry}:all", "--plain-http"),
        *("-r", "rsa.pub.pem", "-k", "p256.pem"),
    )
    run(
        *(place, "imagetool", "ocicrypt", "decrypt", f"{place_in_registry}:all", f"{place_in_registry}:plain"),
        *("--plain-http", "-k", "rsa.pem"),
    )
    run(
        *(place, "imagetool", "ocicrypt", "decrypt", f"{place_in_registry}:all", "oci:back:all"),
        *("--plain-http", "-k", "p256.pem"),
    )
    plain, back = (
        ocicrypt(place, "recipients", "list", reference, "--plain-http")["images"]
        for reference in (f"{place_in_registry}:plain", "oci:back:all")
    )
    assert plain == back
    assert [image["layers"] for image in plain] == [[], []]


@needs_docker_registry
@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")
def test_images_of_dockers(place: Path, server: DockerRegistry) -> None:
    """Their media types become OCI's, their configs stay what they are, byte for byte."""
    docker, back = f"docker://{server.host}/docker:v2", Store(place / "back")
    skopeo("copy", "--format", "v2s2", "--dest-tls-verify=false", f"oci:{place}/store:plain", docker)
    before = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", docker))
    assert before["layers"][0]["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    words = ("ocicrypt", "encrypt", docker, "oci:secret:docker", "--plain-http", "-r", "p256.pub.pem")
    run(place, "imagetool", *words, "--layer", "1")
    secret = Store(place / "secret").manifest("docker")
    assert [layer.media_type.rpartition(".")[2] for layer in secret.layers] == ["tar+gzip", "tar+gzip+encrypted"]
    assert secret.config.media_type == "application/vnd.oci.image.config.v1+json"
    assert secret.config.digest == before["config"]["digest"]
    skopeo("copy", "--decryption-key", place / "p256.pem", f"oci:{place}/secret:docker", back.reference("theirs"))
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:docker", "oci:back:ours", "-k", "p256.pem")
    assert back.manifest("ours").layers == back.manifest("theirs").layers
    assert [layer.digest for layer in back.manifest("ours").layers] == [one["digest"] for one in before["layers"]]


def test_a_key_that_does_not_open_leaves_no_layout(place: Path) -> None:
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:secret:v1", "-r", "p256.pub.pem")
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v1", "oci:no:v1", code=21)
    run(place, "imagetool", "ocicrypt", "decrypt", "oci:secret:v1", "oci:no:v1", "-k", "nothing.pem", code=3)
    run(place, "imagetool", "ocicrypt", "encrypt", "oci:store:plain", "oci:no:v1", code=21)
    assert not (place / "no").exists()
    index = json.loads((place / "secret" / "index.json").read_text())
    assert len(index["manifests"]) == 1
