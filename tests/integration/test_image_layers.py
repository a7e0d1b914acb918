"""Layers that are odd, and images by someone hostile: what they mean, and what is refused."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import EncfsError, FormatError, IntegrityError, SourceError, UnsupportedError
from encfs.format.writer import VolumeOptions
from encfs.image.compression import Compression
from encfs.image.manifest import DOCKER_MANIFEST_TYPE
from imagetool.pipeline.encrypt_image import ImageOptions
from tests.support.artifacts import ARTIFACT_ID, Keys
from tests.support.container_images import Store, make_image
from tests.support.image_layers import (
    LAYERS,
    Item,
    archive,
    device,
    directory,
    encrypt,
    hard_link,
    names_of,
    plain,
    regular,
    restore,
    symlink,
    tree_of,
)

ODD: dict[str, tuple[list[Item], set[str]]] = {
    "whiteout of an entry behind it": ([regular(".wh.a"), regular("a")], {"a"}),
    "whiteout of an entry before it": ([regular("a"), regular(".wh.a")], {"a"}),
    "file, then directory": ([regular("a"), directory("a"), regular("a/b")], {"a", "a/b"}),
    "directory, then file": ([directory("a"), regular("a/b"), regular("a")], {"a"}),
    "directory twice": ([directory("a"), regular("a/b"), directory("a")], {"a", "a/b"}),
    "hard link replaced": ([regular("a", b"1"), hard_link("b", "a"), regular("a", b"2")], {"a", "b"}),
    "hard link over a file": ([regular("a", b"1"), regular("b", b"2"), hard_link("b", "a")], {"a", "b"}),
    "link to a link": ([symlink("a", "x"), hard_link("b", "a")], {"a", "b"}),
    "AUFS's own": ([regular(".wh..wh.plnk"), regular(".wh..wh.aufs"), regular("a")], {"a"}),
    "slashes and dots": ([directory("/"), regular(".//a"), directory("./b/./c/")], {"a", "b", "b/c"}),
    "absolute names": (
        [directory("/d"), regular("/d/a", b"1"), hard_link("b", "/d/a"), symlink("//s", "/d/a"), regular("/.wh.p")],
        {"d", "d/a", "b", "s"},
    ),
    "absolute names and others": ([regular("a", b"1"), regular("/a", b"2"), regular("./b")], {"a", "b"}),
    "whiteouts in implied directories": ([regular("p/q/.wh.r")], {"p", "p/q"}),
    "opaque directory nowhere else": ([regular("p/.wh..wh..opq")], {"p"}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_layers(tmp_path: Path, store: Store, keys: Keys, case: str) -> None:
    items, expected = ODD[case]
    below = archive(directory("p"), directory("p/q"), regular("p/q/r"))
    make_image(store, "v1", plain(below, archive(*items)) if "implied" in case else plain(archive(*items)))
    encrypt(store.reference("v1"), tmp_path / "enc", keys)
    found = tree_of(tmp_path / "enc", keys)
    assert found.keys() - {""} == expected
    if case == "hard link replaced":
        assert (found["a"][5], found["b"][5]) == (b"2", b"1")
    if case == "hard link over a file":
        assert (found["a"][5], found["b"][5]) == (b"1", b"1")
    restore(tmp_path / "enc", keys, tmp_path / "back")
    assert Store(tmp_path / "back").plain_layers("back")[-1] == archive(*items)


def test_a_directory_that_is_whited_out_and_made_again_hides_what_was_in_it(
    tmp_path: Path, store: Store, keys: Keys
) -> None:
    below = archive(directory("d"), regular("d/old"), directory("d/deep"), regular("d/deep/old"))
    for order in (1, -1):
        above = archive(*[regular(".wh.d"), directory("d", mode=0o700), regular("d/new")][::order])
        make_image(store, "v1", plain(below, above))
        encrypt(store.reference("v1"), tmp_path / f"enc{order}", keys)
        assert names_of(tmp_path / f"enc{order}", keys) == {"", "d", "d/new"}


def test_implied_directories_keep_what_they_were_below(tmp_path: Path, store: Store, keys: Keys) -> None:
    layers = [
        archive(
            directory("a", mode=0o700, uid=5, mtime=1000),
            directory("a/b", mode=0o2711, gid=6, mtime=2000),
            directory("c", mode=0o700),
        ),
        archive(regular("a/b/x"), regular("c/.wh..wh..opq"), regular("new/y")),
        archive(regular(".wh.a"), regular("z")),
        archive(regular("a/b/again")),
    ]
    make_image(store, "two", plain(*layers[:2]))
    encrypt(store.reference("two"), tmp_path / "two", keys)
    found = tree_of(tmp_path / "two", keys)
    assert found["a"][1:5] == (0o700, 5, 0, 1000)
    assert found["a/b"][1:5] == (0o2711, 0, 6, 2000)
    assert found["c"][1] == 0o700
    assert found["new"][1:5] == (0o755, 0, 0, 0)
    make_image(store, "four", plain(*layers))
    encrypt(store.reference("four"), tmp_path / "four", keys)
    # Hidden meanwhile, it is a new one.
    assert tree_of(tmp_path / "four", keys)["a"][1:5] == (0o755, 0, 0, 0)


REFUSED: dict[str, tuple[list[Item], str]] = {
    "absolute and upwards": ([regular("/../etc/passwd")], "leads upwards"),
    "upwards": ([regular("a/../../etc/passwd")], r"leads upwards"),
    "link target upwards": ([regular("a"), hard_link("b", "../a")], "leads upwards"),
    "link target absolute and upwards": ([regular("a"), hard_link("b", "/../a")], "leads upwards"),
    "absolute, below a symbolic link": ([symlink("a", "/etc"), regular("/a/passwd")], "not a directory"),
    "link to a lower layer": ([hard_link("b", "etc/keep")], "hard link to etc/keep, which"),
    "link forwards": ([hard_link("b", "a"), regular("a")], "hard link to a, which"),
    "link to itself": ([regular("a"), hard_link("a", "a")], "given twice"),
    "link to a directory": ([directory("a"), hard_link("b", "a")], "hard link to the directory a"),
    "link whose target it replaces": ([regular("d/x"), hard_link("d", "d/x")], "hard link to d/x"),
    "below a symbolic link": ([symlink("a", "/etc"), regular("a/passwd")], "not a directory"),
    "below a file": ([regular("a"), regular("a/b")], "not a directory"),
    "root is a file": ([regular("./", b"x", type=tarfile.CONTTYPE)], "root of an image"),
    "device 0:0": ([device("a", 0, 0)], "whiteout"),
    "device out of range": ([device("a", 5000, 0)], "out of range"),
    "overlayfs's attribute": (
        [directory("a", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/etc"})],
        "reserved for overlayfs",
    ),
    "attribute that cannot be kept": ([regular("a", pax_headers={"SCHILY.xattr.system.x": "y"})], "cannot be kept"),
    "whiteout of nothing": ([regular("a/.wh.")], "whiteout of nothing"),
    "whiteout of the parent": ([regular("a/.wh...")], "whiteout of nothing"),
    "name too long": ([regular("n" * 256)], "name of 256 bytes"),
    "path too long": ([regular("a/" * 2048 + "b")], "path of 4097 bytes"),
    "empty link": ([symlink("a", "")], "symbolic link target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_hostile_layers_are_refused(tmp_path: Path, store: Store, keys: Keys, case: str) -> None:
    items, message = REFUSED[case]
    make_image(store, "v1", plain(LAYERS[0], archive(*items)))
    with pytest.raises(SourceError, match=rf"layer 2 of 2 \(sha256:.*{message}") as caught:
        encrypt(store.reference("v1"), tmp_path / "enc", keys)
    assert "\n" not in str(caught.value)
    assert len(caught.value.message) < 600
    assert not (tmp_path / "enc").exists()


def test_damaged_images_are_refused(tmp_path: Path, store: Store, keys: Keys) -> None:
    compressed = [(LAYERS[0], Compression.GZIP), (LAYERS[1], Compression.ZSTD)]
    true = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in LAYERS[:2]]
    make_image(store, "swapped", compressed, diff_ids=true[::-1])
    with pytest.raises(IntegrityError, match=r"layer 1 of 2 .*its content is"):
        encrypt(store.reference("swapped"), tmp_path / "enc", keys)
    make_image(store, "few", compressed, diff_ids=true[:1])
    with pytest.raises(FormatError, match="lists 2 layers, its config 1"):
        encrypt(store.reference("few"), tmp_path / "enc", keys)
    for number, kind in ((0, "gzip"), (1, "zstd")):
        make_image(store, "good", compressed)
        whole = store.blob(store.manifest("good").layers[number].digest)
        cut = store.add(whole[: len(whole) // 2], "x")

        def change(document: dict[str, Any], number: int = number, cut: Any = cut) -> None:
            document["layers"][number].update(digest=cut.digest, size=cut.size)

        with pytest.raises(EncfsError, match=rf"layer {number + 1} of 2 .*({kind}|cut short)"):
            encrypt(store.change("good", change), tmp_path / "enc", keys)
    make_image(store, "rotten", compressed)
    blob = store.path / "blobs" / store.manifest("rotten").layers[1].digest.replace(":", "/")
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(EncfsError, match=r"layer 2 of 2"):
        encrypt(store.reference("rotten"), tmp_path / "enc", keys)
    assert not (tmp_path / "enc").exists()


def test_sparse_bombs_are_stopped(tmp_path: Path, store: Store, keys: Keys) -> None:
    """A few kilobytes that describe files whose block maps or padding would fill a disk."""
    scattered = ",".join(f"{index << 31},1" for index in range(8000))
    for size, pieces, message in (
        (1 << 62, "0,1", "16 TiB"),
        (1 << 44, scattered, "more than 1 GiB"),
    ):
        count = pieces.count(",") // 2 + 1
        records = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(size)}
        item = regular("bomb", b"x" * count, pax_headers=records | {"GNU.sparse.map": pieces})
        make_image(store, "v1", plain(archive(item)))
        for flatten in (False, True):
            options = ImageOptions(ARTIFACT_ID, 1, VolumeOptions(compress=True), flatten=flatten)
            with pytest.raises(SourceError, match=message):
                encrypt(store.reference("v1"), tmp_path / "enc", keys, options=options)
    assert Store(tmp_path / "enc").blobs() == set()


@pytest.mark.parametrize("kind", [Compression.GZIP, Compression.ZSTD])
def test_bombs_are_stopped(tmp_path: Path, store: Store, keys: Keys, kind: Compression) -> None:
    make_image(store, "v1", [(archive(regular("zeros", bytes(20 << 20))), kind)])
    options = ImageOptions(ARTIFACT_ID, 1, VolumeOptions(compress=True), max_layer_size=4 << 20)
    with pytest.raises(FormatError, match="decompresses to more than 4 MiB"):
        encrypt(store.reference("v1"), tmp_path / "enc", keys, options=options)
    assert Store(tmp_path / "enc").blobs() == set()


def test_media_types_of_docker_and_of_others(tmp_path: Path, store: Store, keys: Keys) -> None:
    make_image(store, "v1", [(LAYERS[0], Compression.GZIP)])

    def dockerise(document: dict[str, Any]) -> None:
        document["mediaType"] = DOCKER_MANIFEST_TYPE
        document["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json"
        document["layers"][0]["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"

    encrypt(store.change("v1", dockerise), tmp_path / "enc", keys)
    for media_type, message in (
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "ocicrypt decrypt"),
        ("application/octet-stream", "no tar archive"),
    ):
        changed = store.change(
            "v1", lambda document, kind=media_type: document["layers"][0].update(mediaType=kind), new_tag="other"
        )
        with pytest.raises(UnsupportedError) as caught:
            encrypt(changed, tmp_path / "enc", keys)
        assert message in str(caught.value)
