"""`imagetool encrypt IMAGE` and back, judged by umoci and skopeo: layers, platforms, archives, what is taken over."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import EncfsError, FormatError, SourceError, UnsupportedError, UsageError
from encfs.format.suite import SUITES
from encfs.format.writer import VolumeOptions
from encfs.image.compression import Compression
from encfs.image.manifest import INDEX_TYPE, Platform
from encfs.keys.providers import provider_from_uri
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from imagetool.pipeline.encrypt_image import ImageOptions, ImagesResult, encrypt_images
from imagetool.pipeline.reuse import opened_earlier
from imagetool.sources.stored import opened_images
from tests.support.artifacts import ARTIFACT_ID, Keys
from tests.support.container_images import Store, make_image, make_index
from tests.support.image_layers import (
    LAYERS,
    archive,
    directory,
    encrypt,
    hard_link,
    needs_skopeo,
    needs_umoci,
    open_encrypted,
    plain,
    regular,
    restore,
    symlink,
    tree_of,
    unpacked,
)


@needs_umoci
@pytest.mark.parametrize("flatten", [False, True], ids=["layers", "flattened"])
def test_the_merged_tree_is_what_umoci_unpacks(tmp_path: Path, store: Store, keys: Keys, flatten: bool) -> None:
    make_image(store, "v1", plain(*LAYERS))
    options = ImageOptions(ARTIFACT_ID, 1, VolumeOptions(compress=True), flatten=flatten)
    encrypt(store.reference("v1"), tmp_path / "enc", keys, options=options)
    expected = unpacked(f"{store.path}:v1", tmp_path / "unpacked")
    actual = tree_of(tmp_path / "enc", keys)
    assert actual.keys() == expected.keys()
    for path, attributes in expected.items():
        # Times of directories that change below are the unpacking's own.
        count = 4 if stat.S_ISDIR(int(str(attributes[0]))) else None
        assert actual[path][:count] == attributes[:count], path
        assert actual[path][5] == attributes[5], path


@needs_umoci
def test_absolute_names_are_what_umoci_and_tar_take_them_for(tmp_path: Path, store: Store, keys: Keys) -> None:
    layers = [
        archive(
            directory("/etc/", mode=0o750, uid=7),
            regular("/etc/keep", b"keep"),
            regular("//etc//gone", b"gone"),
            hard_link("again", "/etc/keep"),
            symlink("/etc/link", "/etc/keep"),
            regular("etc/twice", b"first"),
            regular("/etc/twice", b"second"),
            directory("/opaque"),
            regular("/opaque/old"),
        ),
        archive(regular("/etc/.wh.gone"), regular("/opaque/.wh..wh..opq"), regular("/opaque/new", b"new")),
    ]
    make_image(store, "v1", plain(*layers))
    encrypt(store.reference("v1"), tmp_path / "enc", keys)
    expected = unpacked(f"{store.path}:v1", tmp_path / "unpacked")
    actual = tree_of(tmp_path / "enc", keys)
    assert actual.keys() == expected.keys()
    assert {path: found[5] for path, found in actual.items()} == {path: found[5] for path, found in expected.items()}
    (tmp_path / "tar").mkdir()
    unpacking = ["tar", "-xf", "-", "-C", str(tmp_path / "tar")]
    subprocess.run(unpacking, input=layers[0], check=True, capture_output=True)
    assert (tmp_path / "tar/etc/twice").read_bytes() == actual["etc/twice"][5] == b"second"
    assert (tmp_path / "tar/again").stat().st_nlink == 2
    restore(tmp_path / "enc", keys, tmp_path / "back")
    assert Store(tmp_path / "back").plain_layers("back") == layers
    # All layers in one.
    options = ImageOptions(ARTIFACT_ID, 1, VolumeOptions(compress=True), flatten=True)
    encrypt(store.reference("v1"), tmp_path / "flat", keys, options=options)
    assert tree_of(tmp_path / "flat", keys).keys() == expected.keys()


@pytest.mark.parametrize("compression", list(Compression))
def test_config_and_archives_come_back_byte_for_byte(
    tmp_path: Path, store: Store, keys: Keys, compression: Compression
) -> None:
    # With a layer that occurs twice, and what follows an archive's end.
    layers = [*LAYERS, LAYERS[2], LAYERS[0] + b"trailing" * 1000]
    make_image(store, "v1", [(layer, kind) for layer, kind in zip(layers, [*Compression, *Compression], strict=False)])
    result = encrypt(store.reference("v1"), tmp_path / "enc", keys)
    assert [image.layers for image in result.images] == [5]
    restore(tmp_path / "enc", keys, tmp_path / "back", compression=compression)
    back = Store(tmp_path / "back")
    original, manifest = store.manifest("v1"), back.manifest("back")
    assert back.blob(manifest.config.digest) == store.blob(original.config.digest)
    found = [back.blob(layer.digest) for layer in manifest.layers]
    if compression is Compression.GZIP:
        found = [gzip.decompress(layer) for layer in found]
    if compression is not Compression.ZSTD:
        assert found == layers
    if shutil.which("skopeo"):
        subprocess.run(
            ["skopeo", "copy", "-q", f"oci:{back.path}:back", f"oci:{tmp_path}/copy:x"], check=True, capture_output=True
        )


def test_nothing_of_the_config_is_in_clear(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_image(store, "v1", plain(archive(regular("secret-name", b"secret content"))))
    encrypt(store.reference("v1"), tmp_path / "enc", keys)
    for file in (tmp_path / "enc").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"SECRET" not in content
            assert b"secret" not in content
            assert b"diff_ids" not in content


def test_a_failure_after_some_layers_leaves_nothing(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_image(store, "good", plain(LAYERS[0]))
    encrypt(store.reference("good"), tmp_path / "enc", keys)
    before = Store(tmp_path / "enc").blobs(), (tmp_path / "enc" / "index.json").read_bytes()
    make_image(store, "bad", plain(LAYERS[0], archive(regular("a/../../b"))))
    with pytest.raises(SourceError, match=r"layer 2 of 2 .*\.\."):
        encrypt(store.reference("bad"), tmp_path / "enc", keys)
    assert (Store(tmp_path / "enc").blobs(), (tmp_path / "enc" / "index.json").read_bytes()) == before


# -- all layers in one


def test_a_flattened_image_has_nothing_of_what_is_hidden(tmp_path: Path, store: Store, keys: Keys) -> None:
    secret, kept = os.urandom(50000), os.urandom(50000)
    layers = [
        archive(
            directory("d"),
            regular("d/secret", secret),
            regular("e", secret),
            regular("f", secret),
            directory("o"),
            regular("o/secret", secret),
            regular("linked", kept),
            hard_link("link", "linked"),
        ),
        archive(
            regular(".wh.d"), regular("e", b"new"), directory("f"), regular("o/.wh..wh..opq"), regular(".wh.linked")
        ),
    ]
    make_image(store, "v1", plain(*layers))
    flat = ImageOptions(ARTIFACT_ID, 1, VolumeOptions(), flatten=True)
    encrypt(store.reference("v1"), tmp_path / "enc", keys, options=flat)
    with open_encrypted(tmp_path / "enc", keys) as artifact:
        (volume,) = artifact.volumes
        assert artifact.payload.volumes[0].name == "rootfs"
        assert artifact.payload.image_config is not None
        content = bytes(volume.read(0, volume.size))
    assert secret not in content
    assert content.count(kept) == 1
    found = tree_of(tmp_path / "enc", keys)
    assert found.keys() == {"", "e", "f", "o", "link"}
    assert found["link"][5] == kept
    with pytest.raises(UnsupportedError, match="one by one"):
        restore(tmp_path / "enc", keys, tmp_path / "back")
    assert Store(tmp_path / "back").blobs() == set()


# -- layers that are taken over


def reuse(source: str, earlier: Path, target: Path, keys: Keys, *, hash_name: str = "blake3") -> ImagesResult:
    trust = TrustPolicy(keys=(keys.verifier,), artifact_id=ARTIFACT_ID, min_version=1)
    with (
        opened_images(parse_reference(source), StoreOptions()) as images,
        opened_earlier(
            parse_reference(f"oci:{earlier}:v1"),
            StoreOptions(),
            images.images[0].platform,
            keys=[provider_from_uri(str(keys.recipient_file))],
            trust=trust,
        ) as artifact,
        closing(Layout(target, create=True)) as sink,
    ):
        return encrypt_images(
            images,
            sink,
            [keys.public],
            signers=[keys.signer],
            options=ImageOptions(ARTIFACT_ID, 2, VolumeOptions(suite=SUITES[hash_name], compress=True)),
            tag="v1",
            progress=NoProgress(),
            earlier=[artifact],
        )


def test_layers_that_are_the_same_are_taken_over(tmp_path: Path, store: Store, keys: Keys) -> None:
    implies = archive(regular("etc/more", b"x"))
    make_image(store, "one", plain(LAYERS[0], implies))
    encrypt(store.reference("one"), tmp_path / "one", keys)
    make_image(store, "two", plain(LAYERS[0], implies, archive(regular("etc/third"))))
    result = reuse(store.reference("two"), tmp_path / "one", tmp_path / "two", keys)
    assert (result.images[0].layers, result.images[0].reused) == (3, 2)
    assert result.stored_size < 40_000
    with open_encrypted(tmp_path / "one", keys) as one, open_encrypted(tmp_path / "two", keys) as two:
        assert two.content.volumes[:4] == one.content.volumes
    assert tree_of(tmp_path / "two", keys)["etc"][1:4] == (0o750, 7, 8)
    restore(tmp_path / "two", keys, tmp_path / "back")
    assert len(Store(tmp_path / "back").plain_layers("back")) == 3
    # Above other layers the second one would have another directory's attributes.
    make_image(store, "three", plain(archive(directory("etc", mode=0o711)), implies, LAYERS[2]))
    result = reuse(store.reference("three"), tmp_path / "one", tmp_path / "three", keys)
    assert result.images[0].reused == 0
    assert tree_of(tmp_path / "three", keys)["etc"][1] == 0o711
    with pytest.raises(UnsupportedError, match="another hash"):
        reuse(store.reference("two"), tmp_path / "one", tmp_path / "two", keys, hash_name="sha256")


# -- platforms


def test_an_index_becomes_an_index_of_artifacts(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_index(store, "v1", {"amd64": plain(LAYERS[0]), "arm64": plain(LAYERS[1])})
    result = encrypt(store.reference("v1"), tmp_path / "enc", keys)
    assert result.is_index
    assert [str(image.platform) for image in result.images] == ["linux/amd64", "linux/arm64"]
    with closing(Layout(tmp_path / "enc", tag="v1")) as layout:
        document = layout.document()
        assert document.media_type == INDEX_TYPE
        entries = json.loads(document.content)["manifests"]
        assert [entry["platform"] for entry in entries] == [
            {"architecture": "amd64", "os": "linux"},
            {"architecture": "arm64", "os": "linux"},
        ]
        assert all("artifactType" not in entry for entry in entries)
    restored = restore(tmp_path / "enc", keys, tmp_path / "back", digest=result.images[1].manifest.digest)
    assert restored.config.architecture == "arm64"


def test_one_platform_of_an_index_is_an_artifact(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_index(store, "v1", {"amd64": plain(LAYERS[0]), "arm64": plain(LAYERS[1])})
    result = encrypt(store.reference("v1"), tmp_path / "enc", keys, platforms=[Platform("linux", "arm64")])
    assert not result.is_index
    assert restore(tmp_path / "enc", keys, tmp_path / "back").config.architecture == "arm64"
    with pytest.raises(UsageError, match="riscv64"):
        encrypt(store.reference("v1"), tmp_path / "enc", keys, platforms=[Platform("linux", "riscv64")])
    make_image(store, "single", plain(LAYERS[0]))
    with pytest.raises(UnsupportedError, match="is for linux/amd64"):
        encrypt(store.reference("single"), tmp_path / "enc", keys, platforms=[Platform("linux", "arm64")])


def test_an_index_within_an_index_is_refused(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_index(store, "inner", {"amd64": plain(LAYERS[0])})
    with closing(Layout(store.path, tag="inner")) as layout:
        inner = layout.document()
    entry = {"mediaType": INDEX_TYPE, "digest": inner.digest, "size": len(inner.content)}
    entry["platform"] = {"os": "linux", "architecture": "amd64"}
    store.put({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [entry]}, "outer")
    with pytest.raises(UnsupportedError, match="no manifest of a container image"):
        encrypt(store.reference("outer"), tmp_path / "enc", keys)
    assert not (tmp_path / "enc").exists()


# -- docker archives


@needs_skopeo
def test_archives_of_docker_save(tmp_path: Path, store: Store, keys: Keys) -> None:
    # skopeo writes the old layout: a directory for each layer, links where a layer occurs twice.
    make_image(store, "v1", plain(LAYERS[0], LAYERS[1], LAYERS[0]))
    subprocess.run(
        ["skopeo", "copy", "-q", store.reference("v1"), f"docker-archive:{tmp_path}/saved.tar:acme/app:v1"],
        check=True,
        capture_output=True,
    )
    encrypt(f"docker-archive:{tmp_path}/saved.tar", tmp_path / "enc", keys)
    with open_encrypted(tmp_path / "enc", keys) as artifact:
        config = artifact.payload.image_config
    with tarfile.open(tmp_path / "saved.tar") as saved:
        file = saved.extractfile(json.loads(saved.extractfile("manifest.json").read())[0]["Config"])  # type: ignore[union-attr]
        assert file is not None
        assert config == file.read()
    restore(tmp_path / "enc", keys, tmp_path / "back")
    assert Store(tmp_path / "back").plain_layers("back") == [LAYERS[0], LAYERS[1], LAYERS[0]]


def saved_by_docker_25(store: Store, path: Path, change: Callable[[list[Any]], None] = lambda manifest: None) -> str:
    """The OCI-shaped archive of newer engines: the layout's files, and a manifest.json that names blobs."""
    image = store.manifest("v1")
    manifest = [
        {
            "Config": "blobs/" + image.config.digest.replace(":", "/"),
            "RepoTags": ["acme/app:v1"],
            "Layers": ["blobs/" + layer.digest.replace(":", "/") for layer in image.layers],
        }
    ]
    change(manifest)
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with tarfile.open(path, "w") as tar:
        for name in ("blobs", "index.json", "manifest.json", "oci-layout"):
            tar.add(store.path / name, name)
    return f"docker-archive:{path}"


def test_archives_of_newer_engines(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_image(store, "v1", [(LAYERS[0], Compression.GZIP), (LAYERS[1], Compression.NONE)])
    encrypt(saved_by_docker_25(store, tmp_path / "saved.tar"), tmp_path / "enc", keys)
    restore(tmp_path / "enc", keys, tmp_path / "back")
    assert Store(tmp_path / "back").plain_layers("back") == LAYERS[:2]


def test_odd_docker_archives_are_refused(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_image(store, "v1", plain(LAYERS[0]))
    changes: list[tuple[Callable[[list[Any]], None], str]] = [
        (lambda manifest: manifest.append(manifest[0]), "2 images"),
        (lambda manifest: manifest.clear(), "no images"),
        (lambda manifest: manifest[0].update(Layers=["../../etc/passwd"]), "has no 'etc/passwd'"),
        (lambda manifest: manifest[0].update(Layers=[]), "0 layers"),
        (lambda manifest: manifest[0].update(Config=7), "malformed"),
    ]
    for change, message in changes:
        reference = saved_by_docker_25(store, tmp_path / "saved.tar", change)
        with pytest.raises(EncfsError, match=message):
            encrypt(reference, tmp_path / "enc", keys)
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((tmp_path / "saved.tar").read_bytes()))
    with pytest.raises(UnsupportedError, match="compressed with gzip"):
        encrypt(f"docker-archive:{packed}", tmp_path / "enc", keys)
    packed.write_bytes(archive(regular("other")))
    with pytest.raises(FormatError, match=r"no manifest\.json"):
        encrypt(f"docker-archive:{packed}", tmp_path / "enc", keys)
    assert not (tmp_path / "enc").exists()
