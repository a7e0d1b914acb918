"""A real root filesystem as a container image: Debian by debootstrap, made once for the machine and kept."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from encfs.browse import open_image
from encfs.extract import extract_tree
from encfs.format.readahead import ReadAhead
from encfs.image.artifact import is_needed
from encfs.image.compression import Compression
from encfs.oci.layout import Layout
from encfs.progress import NoProgress
from tests.support.artifacts import Keys, make_keys
from tests.support.container_images import Store
from tests.support.image_layers import encrypt, open_encrypted, restore
from tests.support.podman import running_podman

# Making the image takes as long as the mirror does.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="debootstrap and devices need root"),
]

#: What the image runs: something that needs its interpreter, its libraries and its files.
COMMAND = ["sh", "-c", "dpkg-query -W base-files && echo $ENCFS_TEST"]


def call(command: Sequence[str], reason: str) -> None:
    """Run a tool that makes the image; without it, or without its mirror, there is nothing to test."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"{reason}: {(result.stderr or result.stdout).strip()[-300:]}")


@pytest.fixture(scope="module")
def debian() -> Store:
    """An image of two layers, in a directory that outlives the tests."""
    cache = Path(os.environ.get("ENCFS_TEST_CACHE", Path(tempfile.gettempdir()) / f"encfs-test-cache-{os.getuid()}"))
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    assert cache.stat().st_uid == os.getuid()
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        image = cache / "debian"
        if not image.exists():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                build(Path(work))
                os.rename(Path(work) / "image", image)
        return Store(image)


def mirrors() -> list[str]:
    """Where this machine's apt gets Debian from; empty where that is not known, and debootstrap has a default."""
    command = ["apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages", "Codename: bookworm"]
    if shutil.which(command[0]) is None:
        return []
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return sorted(set(listed))[:1]


def build(work: Path) -> None:
    call(
        ["debootstrap", "--variant=minbase", "bookworm", str(work / "root"), *mirrors()],
        "debootstrap made no root filesystem",
    )
    shutil.rmtree(work / "root" / "var" / "cache" / "apt" / "archives")
    image = f"{work}/image:v1"
    config = [argument for part in COMMAND for argument in ("--config.cmd", part)]
    for arguments in (
        ["init", "--layout", f"{work}/image"],
        ["new", "--image", image],
        ["insert", "--image", image, f"{work}/root", "/"],
        ["insert", "--image", image, "--whiteout", "/usr/share/doc"],
        ["config", "--image", image, *config, "--config.env", "ENCFS_TEST=as encrypted"],
    ):
        call(["umoci", *arguments], "umoci made no image")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, debian: Store, keys: Keys) -> Path:
    target = tmp_path_factory.mktemp("encrypted") / "store"
    result = encrypt(debian.reference("v1"), target, keys)
    assert result.images[0].layers == 2
    return target


def listing(root: Path) -> list[str]:
    """Everything but directories: path, type, mode, owner, size, device and target."""
    form = r"%P|%y|%m|%U|%G|%s|%l|%T@\n"
    found = subprocess.run(
        ["find", str(root), "!", "-type", "d", "-printf", form], capture_output=True, text=True, check=True
    )
    return sorted(found.stdout.splitlines())


def test_the_tree_is_what_umoci_unpacks(tmp_path: Path, debian: Store, encrypted: Path, keys: Keys) -> None:
    subprocess.run(["umoci", "unpack", "--image", f"{debian.path}:v1", str(tmp_path / "umoci")], check=True)
    with open_encrypted(encrypted, keys) as artifact:
        assert sum(volume.size for volume in artifact.volumes) > 100 << 20
    with open_encrypted(encrypted, keys, wanted=is_needed) as artifact:
        image = open_image(artifact)
        with closing(ReadAhead(image.volume)) as ahead:
            extract_tree(image.tree, ahead, tmp_path / "extracted", NoProgress())
    expected, actual = tmp_path / "umoci" / "rootfs", tmp_path / "extracted"
    names = listing(actual)
    assert len(names) > 2000
    # umoci sets times to the microsecond only.
    assert [name.rpartition(".")[0] for name in names] == [name.rpartition(".")[0] for name in listing(expected)]
    for directory in ("usr", "etc", "var"):
        subprocess.run(["diff", "-rq", "--no-dereference", expected / directory, actual / directory], check=True)
    assert not (actual / "usr" / "share" / "doc").exists()


def test_podman_runs_what_was_decrypted(tmp_path: Path, debian: Store, encrypted: Path, keys: Keys) -> None:
    restore(encrypted, keys, tmp_path / "back", compression=Compression.ZSTD)
    back, original = Store(tmp_path / "back"), debian.manifest("v1")
    with closing(Layout(back.path, tag="back")):
        assert back.manifest("back").config.digest == original.config.digest
    with running_podman() as podman:
        result = podman.run(f"oci:{back.path}:back")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("base-files")
    assert result.stdout.endswith("as encrypted\n")
