"""podman over what encfs mounts, and what podman saves as a source."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.keys.files import write_key_files
from encfs.mount.mountpoint import top_mount, unmount
from encfs.oci.layout import Layout
from tests.integration.test_image_mount import Place
from tests.support.artifacts import Keys, make_keys
from tests.support.container_images import Store
from tests.support.image_artifacts import directory, encrypt_image, file, image_config, link
from tests.support.image_layers import encrypt, restore, tree_of
from tests.support.podman import Podman, running_podman

pytestmark = [pytest.mark.fuse, pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")]

SCRIPT = "cat /work/data; echo one >/work/data && echo changed; echo two >/tmp/new && echo made; exit 7"


@pytest.fixture(scope="module")
def podman() -> Iterator[Podman]:
    with running_podman() as podman:
        yield podman


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


# -- root filesystems that encfs has mounted


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A layout with one image of two layers, which has none of the places that engines mount on but /tmp."""
    keys = make_keys(tmp_path)
    write_key_files(keys.signer, tmp_path / "signer.jwk")
    bottom = [
        directory(b""),
        file(b"bin/busybox", Path("/bin/busybox").read_bytes(), 0o755),
        link(b"bin/sh", b"busybox"),
        link(b"bin/cat", b"busybox"),
        directory(b"tmp", mode=0o1777),
        file(b"work/data", b"from the bottom\n"),
    ]
    top = [directory(b""), file(b"work/data", b"from the top\n")]
    layout = Layout(tmp_path / "layout", create=True)
    encrypt_image(layout, [bottom, top], keys, image_config(2), tag="app")
    layout.close()
    place = Place(tmp_path, keys)
    place.mount.mkdir()
    yield place
    while top_mount(str(place.mount)) is not None:
        unmount(str(place.mount), lazy=True)


@pytest.mark.parametrize("backend", ["fuse", "erofs"])
def test_podman_runs_from_a_read_only_mount_under_its_own_overlay(place: Place, podman: Podman, backend: str) -> None:
    pid = place.start("app", "--backend", backend)["pid"]
    for options, said in (((), "from the top\nchanged\nmade\n"), (("--read-only",), "from the top\nmade\n")):
        done = podman.run(*options, "--rootfs", f"{place.mount}:O", "/bin/sh", "-c", SCRIPT)
        assert (done.returncode, done.stdout) == (7, said), done.stderr
    assert (place.mount / "work/data").read_text() == "from the top\n"
    assert not (place.mount / "tmp/new").exists()
    place.stop(pid)


def test_podman_runs_from_a_writable_mount(place: Place, podman: Podman) -> None:
    pid = place.start("app", "--writable")["pid"]
    done = podman.run("--rootfs", place.mount, "/bin/sh", "-c", SCRIPT)
    assert (done.returncode, done.stdout) == (7, "from the top\nchanged\nmade\n"), done.stderr
    assert (place.mount / "work/data").read_text() == "one\n"
    # The next container goes on from there, and cannot change anything where it is told not to.
    done = podman.run("--read-only", "--rootfs", place.mount, "/bin/sh", "-c", SCRIPT)
    assert (done.returncode, done.stdout) == (7, "one\nmade\n"), done.stderr
    place.stop(pid)


# -- what `podman save` writes


@pytest.fixture(scope="module")
def saved(podman: Podman, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of two layers, as podman saves it in three forms."""
    target = tmp_path_factory.mktemp("saved")
    for name, base in (("below", None), ("app", "localhost/below:v1")):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as tar:
            for path in ("etc/shared", f"work/{name}"):
                member = tarfile.TarInfo(path)
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
        if base is None:
            done = podman.call("import", "-", f"localhost/{name}:v1", stdin=content.getvalue())
        else:
            context = target / "context"
            context.mkdir()
            (context / "layer.tar").write_bytes(content.getvalue())
            (context / "Dockerfile").write_text(f"FROM {base}\nADD layer.tar /\nENV WHO=podman\n")
            done = podman.call("build", "--isolation", "chroot", "-t", f"localhost/{name}:v1", context)
        assert done.returncode == 0, done.stderr
    for form in ("docker-archive", "oci-archive", "oci-dir"):
        done = podman.call("save", "--format", form, "-o", target / form, "localhost/app:v1")
        assert done.returncode == 0, done.stderr
    return target


def test_podmans_docker_archive_is_encrypted_and_given_back(
    saved: Path, keys: Keys, podman: Podman, tmp_path: Path
) -> None:
    result = encrypt(f"docker-archive:{saved / 'docker-archive'}", tmp_path / "enc", keys)
    assert [image.layers for image in result.images] == [2]
    tree = tree_of(tmp_path / "enc", keys)
    assert (tree["etc/shared"][-1], tree["work/below"][-1], tree["work/app"][-1]) == (b"app", b"below", b"app")
    restored = restore(tmp_path / "enc", keys, tmp_path / "back")
    # The config's digest is the image's id: podman finds the image that it has.
    known = podman.call("image", "inspect", "--format", "{{.Id}}", "localhost/app:v1").stdout.strip()
    back = Store(tmp_path / "back").manifest("back")
    assert back.config.digest == f"sha256:{known}"
    assert restored.config.diff_ids == tuple(layer.digest for layer in back.layers)


def test_podmans_oci_forms_are_layouts(saved: Path, keys: Keys, tmp_path: Path) -> None:
    trees = []
    for number, image in enumerate((f"oci:{saved / 'oci-dir'}", f"oci-archive:{saved / 'oci-archive'}")):
        encrypt(image, tmp_path / f"enc{number}", keys)
        trees.append(tree_of(tmp_path / f"enc{number}", keys))
    assert trees[0] == trees[1]
    assert trees[0]["work/app"][-1] == b"app"
