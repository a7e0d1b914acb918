"""Images by umoci, encrypted from a registry by our command: what is mounted and run is what umoci unpacks."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encfs.mount.mountpoint import top_mount, unmount
from encfs.mount.runtime import ENVIRONMENT_VARIABLE
from tests.support.registry import DockerRegistry
from tests.support.remote import needs_registries, running
from tests.support.trees import FILE_CAPABILITY, assert_same, scan_tree

pytestmark = [needs_registries, pytest.mark.fuse, pytest.mark.root]

TRUST = ["-k", "alice.jwk", "--trust", "owner.jwk.pub", "--id", "acme/app"]


def encfs(place: Path, program: str, *words: str, code: int = 0) -> str:
    """One of our commands, on a registry without TLS."""
    done = subprocess.run(
        [sys.executable, "-c", f"from {program}.cli import main; main()", *words],
        cwd=place,
        env={**os.environ, ENVIRONMENT_VARIABLE: str(place / "run"), "XDG_CACHE_HOME": str(place / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("registry"), delete=True) as server:
        yield server


@pytest.fixture(scope="module")
def place(server: DockerRegistry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys, and an image in the registry: made by umoci in three steps, a layer each."""
    place = tmp_path_factory.mktemp("rootfs")
    image = f"{place / 'layout'}:v1"

    def umoci(*words: str) -> None:
        subprocess.run(["umoci", *words], check=True, capture_output=True, timeout=60)

    def step(number: int) -> Path:
        bundle = place / f"bundle{number}"
        umoci("unpack", "--image", image, str(bundle))
        return bundle / "rootfs"

    def done(root: Path) -> None:
        umoci("repack", "--image", image, str(root.parent))

    umoci("init", "--layout", str(place / "layout"))
    umoci("new", "--image", image)
    root = step(1)
    for name in ("bin", "etc", "d/deep", "o/x"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "cat", "id", "echo", "ls"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/d:\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1000:\n")
    for name in ("d/low", "d/gone", "d/deep/gone", "o/x/hidden", "replaced"):
        (root / name).write_text(name)
    os.link(root / "d/low", root / "d/hard")
    os.mknod(root / "null", 0o20666, os.makedev(1, 3))
    os.chown(root / "d/deep", 7, 8)
    (root / "sparse").touch()
    os.truncate(root / "sparse", 1 << 20)
    done(root)
    root = step(2)
    (root / "d/gone").unlink()
    shutil.rmtree(root / "d/deep")
    shutil.rmtree(root / "o")
    (root / "o").mkdir(mode=0o711)
    (root / "o/new").write_text("new")
    (root / "replaced").unlink()
    (root / "replaced").mkdir()
    os.setxattr(root / "bin/busybox", "security.capability", FILE_CAPABILITY)
    done(root)
    root = step(3)
    (root / "d/low").write_text("changed")
    (root / "replaced/inside").write_text("top")
    done(root)
    command = ["--config.entrypoint=/bin/sh", "--config.cmd=-c", "--config.cmd", "echo $GREETING; id -u; cat low"]
    user = ["--config.user=app", "--config.workingdir=/d", "--config.env=GREETING=hello"]
    umoci("config", "--image", image, *user, *command)
    umoci("unpack", "--image", image, str(place / "unpacked"))
    target = f"docker://{server.host}/library/app:v1"
    copy = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", f"oci:{image}", target]
    subprocess.run(copy, check=True, capture_output=True, timeout=60)
    encfs(place, "imagetool", "keygen", "-o", "owner.jwk", "--type", "ed25519")
    encfs(place, "imagetool", "keygen", "-o", "alice.jwk")
    return place


@pytest.fixture
def mountpoint(place: Path) -> Iterator[Path]:
    path = place / "mnt"
    path.mkdir(exist_ok=True)
    yield path
    while top_mount(str(path)) is not None:
        unmount(str(path), lazy=True)


@pytest.fixture(scope="module")
def encrypted(place: Path, server: DockerRegistry) -> str:
    """The reference of the image, encrypted as the README says."""
    encrypt, *_ = _readme_lines(server)
    assert encrypt[:2] == ["imagetool", "encrypt"]
    encfs(place, *encrypt, "--plain-http")
    return encrypt[3]


def _readme_lines(server: DockerRegistry) -> list[list[str]]:
    page = (Path(__file__).parents[2] / "README.md").read_text()
    section = page.split("\n## Container images\n")[1].split("\n## ")[0]
    lines = [line.replace("HOST", server.host) for line in section.splitlines() if line.startswith("    ")]
    return [shlex.split(line) for line in lines]


def test_the_lines_of_the_readme(place: Path, server: DockerRegistry, encrypted: str, mountpoint: Path) -> None:
    _, run, mount = _readme_lines(server)
    assert encfs(place, *run, "--plain-http") == "hello\n1000\nchanged"
    encfs(place, *mount, "--plain-http")
    assert (mountpoint / "d/low").read_text() == "changed"
    encfs(place, "encfs", "umount", "mnt")


@pytest.mark.parametrize("backend", ["fuse", "erofs"])
def test_it_is_what_umoci_unpacks(place: Path, encrypted: str, mountpoint: Path, backend: str) -> None:
    status: dict[str, Any] = json.loads(
        encfs(place, "encfs", "mount", encrypted, "mnt", *TRUST, "--plain-http", "--backend", backend, "--json")
    )
    assert status["backend"] == backend
    seen, unpacked = scan_tree(mountpoint), scan_tree(place / "unpacked" / "rootfs")
    # umoci itself made some of them, and left times of its own.
    for path in (b"", b"o", b"replaced", b"d"):
        unpacked[path].mtime_ns = seen[path].mtime_ns
    assert_same(unpacked, seen)
    assert {b"d/gone", b"d/deep", b"o/x"}.isdisjoint(seen)
    encfs(place, "encfs", "umount", "mnt")


def test_it_is_read_without_a_mount(place: Path, encrypted: str) -> None:
    listed = json.loads(encfs(place, "encfs", "ls", "-R", encrypted, *TRUST, "--plain-http", "--json"))["entries"]
    assert {os.fsencode(entry["path"]) for entry in listed} | {b""} == scan_tree(place / "unpacked" / "rootfs").keys()
    assert encfs(place, "encfs", "cat", encrypted, "d/low", *TRUST, "--plain-http") == "changed"
    encfs(place, "encfs", "extract", encrypted, "extracted", *TRUST, "--plain-http")
    extracted, unpacked = scan_tree(place / "extracted"), scan_tree(place / "unpacked" / "rootfs")
    for path in (b"", b"o", b"replaced", b"d"):
        unpacked[path].mtime_ns = extracted[path].mtime_ns
    assert_same(unpacked, extracted)


def test_an_index_is_not_believed(place: Path, server: DockerRegistry, encrypted: str) -> None:
    """An index that names our manifest for another platform chooses it, and the image's own config refuses."""
    repository = encrypted.rpartition(":")[0]
    raw = encfs(place, "imagetool", "inspect", encrypted, "--plain-http", "--json")
    digest = json.loads(raw)["manifest_digest"]
    command = ["skopeo", "inspect", "--raw", "--tls-verify=false", f"{repository}@{digest}"]
    size = len(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout)
    here = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    manifests = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": size,
            "platform": {"os": "linux", "architecture": architecture},
        }
        for architecture in ("s390x", here)
    ]
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    }
    name = repository.removeprefix(f"docker://{server.host}/")
    request = urllib.request.Request(
        f"http://{server.host}/v2/{name}/manifests/index",
        data=json.dumps(index).encode(),
        headers={"Content-Type": index["mediaType"]},
        method="PUT",
    )
    urllib.request.urlopen(request, timeout=30).close()  # noqa: S310
    words = [f"{repository}:index", *TRUST, "--plain-http"]
    assert encfs(place, "encfs", "run", *words).startswith("hello")
    encfs(place, "encfs", "run", *words, "--platform", "linux/s390x", code=7)
    encfs(place, "encfs", "run", *words, "--platform", "linux/riscv64", code=2)
