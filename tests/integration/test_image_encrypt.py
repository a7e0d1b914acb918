"""`imagetool encrypt IMAGE` and back: what layers mean, judged by umoci and skopeo; and images by someone hostile."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from encfs.artifact import Artifact, open_artifact
from encfs.browse import open_image
from encfs.erofs.walk import walk
from encfs.errors import EncfsError, FormatError, IntegrityError, SourceError, UnsupportedError, UsageError
from encfs.format.suite import SUITES
from encfs.format.writer import VolumeOptions
from encfs.image.compression import Compression
from encfs.image.manifest import DOCKER_MANIFEST_TYPE, INDEX_TYPE, Platform
from encfs.keys.providers import provider_from_uri
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from imagetool.pipeline.decrypt_image import RestoredImage, restore_image
from imagetool.pipeline.encrypt_image import ImageOptions, ImagesResult, encrypt_images
from imagetool.pipeline.reuse import opened_earlier
from imagetool.sources.image import opened_images
from tests.support.artifacts import ARTIFACT_ID, Keys, make_keys
from tests.support.container_images import Store, make_image, make_index

needs_umoci = pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed")
needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "images")


# -- archives

Item = tuple[str, dict[str, Any], bytes]


def regular(name: str, content: bytes = b"", **fields: Any) -> Item:
    return name, {"mode": 0o644, **fields}, content


def directory(name: str, **fields: Any) -> Item:
    return name, {"type": tarfile.DIRTYPE, "mode": 0o755, **fields}, b""


def symlink(name: str, target: str) -> Item:
    return name, {"type": tarfile.SYMTYPE, "linkname": target, "mode": 0o777}, b""


def hard_link(name: str, target: str) -> Item:
    return name, {"type": tarfile.LNKTYPE, "linkname": target}, b""


def device(name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE) -> Item:
    return name, {"type": kind, "devmajor": major, "devminor": minor, "mode": 0o600}, b""


def archive(*items: Item, form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, fields, content in items:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.mtime = 1_700_000_000
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def plain(*layers: bytes) -> list[tuple[bytes, Compression]]:
    return [(layer, Compression.NONE) for layer in layers]


# -- encryption and back


def encrypt(
    source: str,
    target: Path,
    keys: Keys,
    *,
    platforms: Sequence[Platform] = (),
    tag: str = "v1",
    options: ImageOptions | None = None,
) -> ImagesResult:
    with (
        opened_images(parse_reference(source), StoreOptions(), platforms) as images,
        closing(Layout(target, create=True)) as sink,
    ):
        return encrypt_images(
            images,
            sink,
            [keys.public],
            signers=[keys.signer],
            options=options or ImageOptions(ARTIFACT_ID, 1, VolumeOptions(compress=True)),
            tag=tag,
            progress=NoProgress(),
        )


def open_encrypted(
    target: Path, keys: Keys, *, digest: str | None = None, wanted: Callable[[str], bool] | None = None
) -> Artifact:
    return open_artifact(
        Layout(target, tag=None if digest else "v1", digest=digest),
        keys=[provider_from_uri(str(keys.recipient_file))],
        trust=TrustPolicy(keys=(keys.verifier,), artifact_id=ARTIFACT_ID, min_version=1),
        wanted=wanted,
    )


def restore(
    target: Path, keys: Keys, out: Path, *, digest: str | None = None, compression: Compression = Compression.NONE
) -> RestoredImage:
    with open_encrypted(target, keys, digest=digest) as artifact, closing(Layout(out, create=True)) as sink:
        return restore_image(artifact, sink, compression=compression, tag="back", progress=NoProgress())


def tree_of(target: Path, keys: Keys) -> dict[str, tuple[object, ...]]:
    """The merged tree: type, mode, owner, time and content of everything."""
    with open_artifact(
        Layout(target, tag="v1"),
        keys=[provider_from_uri(str(keys.recipient_file))],
        trust=TrustPolicy(allow_unsigned=True),
        wanted=lambda name: not name.startswith("tar/"),
    ) as artifact:
        image = open_image(artifact)
        found = {}
        root = image.tree.inode(image.tree.root)
        for path, inode in [(b"", root), *walk(image.tree, root)]:
            content: object = None
            if stat.S_ISREG(inode.mode):
                content = bytes(image.tree.read(inode, 0, inode.size))
            elif stat.S_ISLNK(inode.mode):
                content = image.tree.readlink(inode)
            elif not stat.S_ISDIR(inode.mode):
                content = inode.rdev
            found[path.decode()] = (
                stat.S_IFMT(inode.mode),
                stat.S_IMODE(inode.mode),
                inode.uid,
                inode.gid,
                inode.mtime_ns // 1_000_000_000,
                content,
            )
        return found


def names_of(target: Path, keys: Keys) -> set[str]:
    return set(tree_of(target, keys))


def unpacked(image: str, directory: Path) -> dict[str, tuple[object, ...]]:
    """What `umoci unpack` makes of an image."""
    subprocess.run(["umoci", "unpack", "--image", image, str(directory)], check=True, capture_output=True)
    root = os.fsencode(directory / "rootfs")
    found = {}
    for path, _, files in [(root, [], []), *os.walk(root)]:
        for full in [path, *(os.path.join(path, name) for name in [*files, *os.listdir(path)])]:
            status = os.lstat(full)
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(full)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(full)
            elif not stat.S_ISDIR(status.st_mode):
                content = status.st_rdev
            found[os.fsdecode(full[len(root) :].lstrip(b"/"))] = (
                stat.S_IFMT(status.st_mode),
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
                int(status.st_mtime),
                content,
            )
    return found


LAYERS = [
    archive(
        directory("./"),
        directory("./etc/", mode=0o750, uid=7, gid=8),
        regular("./etc/keep", b"keep"),
        regular("./etc/gone", b"gone"),
        directory("opaque"),
        regular("opaque/old", b"old"),
        directory("becomes-file"),
        regular("becomes-file/below", b"x"),
        regular("becomes-directory", b"y"),
        regular("bin/tool", b"t" * 9000, mode=0o4755),
        hard_link("bin/again", "bin/tool"),
        symlink("bin/sh", "tool"),
        regular("xattr", b"", pax_headers={"SCHILY.xattr.user.note": "für dich"}),
        device("null", 1, 3),
        ("pipe", {"type": tarfile.FIFOTYPE, "mode": 0o600}, b""),
        regular("replaced", b"one"),
        directory("removed"),
        regular("removed/inner", b"z"),
    ),
    archive(
        regular("etc/new", b"its directory is only implied"),
        regular("etc/.wh.gone"),
        regular("opaque/new", b"new"),
        regular("opaque/.wh..wh..opq"),
        regular("becomes-file", b"file now"),
        directory("becomes-directory"),
        regular("becomes-directory/inner", b"inner"),
        regular("replaced", b"two"),
        regular(".wh.removed"),
        directory("removed", mode=0o711),
        regular("twice", b"first"),
        regular("twice", b"second, and longer"),
        regular("n" * 200 + "/" + "m" * 200, b"long"),
    ),
    archive(form=tarfile.GNU_FORMAT),
]


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


# -- layers that are odd, and layers by someone hostile

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
    "absolute": ([regular("/etc/passwd")], "absolute path"),
    "upwards": ([regular("a/../../etc/passwd")], r"leads upwards"),
    "link target upwards": ([regular("a"), hard_link("b", "../a")], "leads upwards"),
    "link target absolute": ([regular("a"), hard_link("b", "/a")], "absolute path"),
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
    assert Store(tmp_path / "enc").tags() == []
    assert Store(tmp_path / "enc").blobs() == set()


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
    assert Store(tmp_path / "enc").tags() == []
    assert Store(tmp_path / "enc").blobs() == set()


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
