"""Container images mounted as root filesystems: by overlayfs over FUSE, over the kernel's EROFS, and merged by us."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import encfs
from encfs.erofs.walk import walk
from encfs.erofs.writer import Entry
from encfs.keys.files import write_key_files
from encfs.mount.mountpoint import top_mount, unmount
from encfs.mount.runtime import ENVIRONMENT_VARIABLE
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID, Keys, make_keys
from tests.support.image_artifacts import (
    Layer,
    directory,
    encrypt_image,
    file,
    hard_link,
    image_config,
    link,
    make_tree,
    whiteout,
)
from tests.support.trees import FILE_CAPABILITY, POSIX_ACL, assert_same, scan_image, scan_tree
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

BACKENDS = ("fuse", "erofs")


@dataclass
class Place:
    """A layout with images, keys, a mount point and a runtime directory."""

    base: Path
    keys: Keys

    @property
    def mount(self) -> Path:
        return self.base / "mnt"

    def run(self, *words: str, code: int = 0, user: int | None = None) -> dict[str, Any]:
        """A command of encfs; what it prints as JSON."""
        done = subprocess.run(
            [sys.executable, "-c", "from encfs.cli import main; main()", *words, "--json"],
            env={**os.environ, ENVIRONMENT_VARIABLE: str(self.base / "run")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return dict(json.loads(done.stdout)) if done.stdout else {}

    def trust(self) -> list[str]:
        return ["-k", str(self.keys.recipient_file), "--trust", str(self.base / "signer.jwk.pub"), "--id", ARTIFACT_ID]

    def start(self, tag: str, *options: str, code: int = 0) -> dict[str, Any]:
        reference = f"oci:{self.base / 'layout'}:{tag}"
        return self.run("mount", reference, str(self.mount), *self.trust(), *options, code=code)

    def stop(self, pid: int) -> None:
        self.run("umount", str(self.mount))
        self.assert_nothing_is_left(pid)

    def assert_nothing_is_left(self, pid: int) -> None:
        assert top_mount(str(self.mount)) is None
        assert list(self.mount.iterdir()) == []
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        assert list((self.base / "run").iterdir()) == []

    def state(self) -> str:
        return "".join(m["state"] for m in self.run("status")["mounts"] if m["mountpoint"] == str(self.mount))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A layout with every image of these tests."""
    base = tmp_path_factory.mktemp("images")
    keys = make_keys(base)
    write_key_files(keys.signer, base / "signer.jwk")
    layout = Layout(base / "layout", create=True)
    encrypt_image(layout, LAYERS, keys, image_config(3), tag="odd")
    encrypt_image(layout, LAYERS, keys, image_config(3), tag="unsigned", signed=False)
    encrypt_image(layout, LAYERS[:1], keys, image_config(1), tag="one")
    encrypt_image(layout, [[directory(b""), file(b"f", b"flat")]], keys, image_config(1), tag="flat", flat=True)
    encrypt_image(layout, LAYERS, keys, image_config(3, architecture="s390x"), tag="foreign")
    encrypt_image(layout, LAYERS, keys, image_config(2), tag="contradiction")
    encrypt_image(layout, HOSTILE, keys, image_config(2), tag="hostile")
    many = [[directory(b""), file(b"%d" % number, b"")] for number in range(100)]
    encrypt_image(layout, many, keys, image_config(100), tag="many", auxiliary=False)
    layout.close()
    return Place(base, keys)


@pytest.fixture
def place(store: Place, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, store.keys)
    (tmp_path / "layout").symlink_to(store.base / "layout")
    (tmp_path / "signer.jwk.pub").symlink_to(store.base / "signer.jwk.pub")
    place.mount.mkdir()
    yield place
    while top_mount(str(place.mount)) is not None:
        unmount(str(place.mount), lazy=True)


def _random_layers(seed: int, path: Path) -> list[Layer]:
    """Layers that add, change and remove names at random, as few names as make them meet.

    Whiteouts are of names that are there: in a directory of one layer the kernel lists those of nothing, too.
    """
    chance = random.Random(seed)
    layers: list[Layer] = []
    seen: set[bytes] = set()
    for level in range(4):
        entries: dict[bytes, tuple[Entry, bytes]] = {b"": directory(b"")}
        for _ in range(60):
            name = b"/".join(chance.choice((b"a", b"b", b"c", b"d")) for _ in range(chance.randint(1, 4)))
            above = [name[:end] for end in range(len(name)) if name[end : end + 1] == b"/"]
            if name in entries or any(not stat.S_ISDIR(entries[p][0].mode) for p in above if p in entries):
                continue
            for parent in above:
                entries.setdefault(parent, directory(parent, opaque=chance.random() < 0.1, mode=0o700 + level))
            if chance.random() < 0.4:
                entries[name] = directory(name, opaque=chance.random() < 0.2, mtime_ns=level * 10**9)
                continue
            choices = [file(name, chance.choice((b"", name * level, bytes(5000))), uid=level), link(name, b"x")]
            if name in seen and not any(entries[parent][0].xattrs for parent in above):
                choices += [whiteout(name)] * 2
            entries[name] = chance.choice(choices)
        layers.append(list(entries.values()))
        (path / f"{level}").mkdir()
        tree = make_tree(path / f"{level}", layers)
        seen = {name for name, _ in walk(tree, tree.inode(tree.root))}
    return layers


LAYERS: list[Layer] = [
    [
        directory(b"", mode=0o751),
        file(b"etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
        file(b"large", os.urandom(3_000_000)),
        file(b"d/low", b"low", mtime_ns=1_700_000_000_123_456_789),
        file(b"d/gone", b"gone"),
        file(b"o/hidden", b""),
        file(b"setuid", b"#!", 0o4755),
        (Entry(b"acl", stat.S_IFREG | 0o660, xattrs=((b"system.posix_acl_access", POSIX_ACL),)), b""),
        (Entry(b"capable", stat.S_IFREG | 0o755, xattrs=((b"security.capability", FILE_CAPABILITY),)), b""),
        (Entry(b"null", stat.S_IFCHR | 0o666, rdev=os.makedev(1, 3)), b""),
    ],
    [
        directory(b""),
        whiteout(b"d/gone"),
        directory(b"o", opaque=True),
        file(b"o/shown", b"shown"),
        file(b"hard", b"hard"),
        hard_link(b"linked", b"hard"),
        *(file(b"many/%04d" % number, b"") for number in range(1500)),
    ],
    [directory(b""), file(b"d/top", b"top"), file(b"many/0000", b"changed"), whiteout(b"many/0001")],
]

HOSTILE: list[Layer] = [
    [directory(b""), file(b"private/f", b"secret", 0o600), directory(b"private", mode=0o700)],
    [
        directory(b""),
        (Entry(b"moved", stat.S_IFDIR | 0o755, xattrs=((b"trusted.overlay.redirect", b"/private"),)), b""),
        (
            Entry(
                b"copy",
                stat.S_IFREG | 0o644,
                xattrs=((b"trusted.overlay.metacopy", b""), (b"trusted.overlay.redirect", b"/private/f")),
            ),
            b"",
        ),
    ],
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kernel_and_we_see_the_same_tree(place: Place, backend: str) -> None:
    status = place.start("odd", "--backend", backend)
    assert (status["backend"], status["writable"]) == (backend, False)
    seen = scan_tree(place.mount)
    with encfs.open(
        f"oci:{place.base / 'layout'}:odd",
        key=str(place.keys.recipient_file),
        trust=place.base / "signer.jwk.pub",
        id=ARTIFACT_ID,
    ) as artifact:
        assert_same(scan_image(artifact.files._tree), seen)
    assert len(seen) > 1500
    assert seen[b"hard"].group == (b"hard", b"linked")
    place.stop(status["pid"])


def test_random_layers_are_what_the_kernel_makes_of_them(store: Place, place: Place) -> None:
    for seed in range(4):
        (place.base / f"{seed}").mkdir()
        layers = _random_layers(seed, place.base / f"{seed}")
        layout = Layout(store.base / "layout")
        encrypt_image(layout, layers, store.keys, image_config(len(layers)), tag=f"random{seed}", auxiliary=False)
        layout.close()
        status = place.start(f"random{seed}")
        seen = scan_tree(place.mount)
        reference = f"oci:{place.base / 'layout'}:random{seed}"
        with encfs.open(reference, key=str(store.keys.recipient_file), allow_unsigned=True) as artifact:
            assert_same(scan_image(artifact.files._tree), seen)
        assert len(seen) > 10
        place.stop(status["pid"])


@pytest.mark.parametrize(
    ("tag", "options", "kind", "flags"),
    [
        ("odd", [], "overlay", {"ro", "nosuid", "nodev"}),
        ("odd", ["--backend", "auto", "--suid", "--dev"], "overlay", {"ro"}),
        ("odd", ["--writable"], "overlay", {"rw", "nosuid", "nodev"}),
        ("one", [], "overlay", {"ro", "nosuid", "nodev"}),
        ("flat", [], "fuse.encfs", {"ro", "nosuid", "nodev"}),
        ("flat", ["--backend", "erofs"], "erofs", {"ro", "nosuid", "nodev"}),
        ("flat", ["--writable", "--backend", "erofs", "--dev"], "overlay", {"rw", "nosuid"}),
        ("many", ["--backend", "erofs"], "overlay", {"ro", "nosuid", "nodev"}),
        ("many", [], "overlay", {"ro", "nosuid", "nodev"}),
    ],
)
def test_it_is_one_mount_with_the_attributes_asked_for(
    place: Place, tag: str, options: list[str], kind: str, flags: set[str]
) -> None:
    status = place.start(tag, *options)
    mount = top_mount(str(place.mount))
    assert mount is not None
    assert mount.filesystem_type == kind
    assert {"ro", "rw", "nosuid", "nodev"} & set(mount.options.split(",")) == flags
    assert mount.device == status["device"]
    # What is below it is seen by nobody.
    assert Path("/proc/self/mountinfo").read_text().count(str(place.base)) == 1
    assert len(list(place.mount.iterdir())) == {"odd": 11, "one": 8, "flat": 1, "many": 100}[tag]
    place.stop(status["pid"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_stay_in_memory_or_where_they_are_told_to(place: Place, backend: str) -> None:
    for options, kept in ((("--writable",), False), (("--writable", "--upper", str(place.base / "upper")), True)):
        (place.base / "upper").mkdir(exist_ok=True)
        for turn in range(2):
            status = place.start("odd", "--backend", backend, *options)
            assert (place.mount / "new").exists() is (kept and turn == 1)
            assert (place.mount / "d" / "low").exists() is not (kept and turn == 1)
            assert stat.S_IMODE(place.mount.stat().st_mode) == 0o755
            if turn == 0:
                (place.mount / "new").write_text("new")
                (place.mount / "d" / "low").unlink()
                with open(place.mount / "large", "r+b") as large:
                    large.write(b"changed")
            place.stop(status["pid"])


def test_a_supervised_image_is_the_merged_tree(place: Place) -> None:
    """A FUSE connection that is handed over is the mount itself."""
    status = place.start("odd", "--supervise")
    mount = top_mount(str(place.mount))
    assert mount is not None
    assert mount.filesystem_type == "fuse.encfs"
    assert (place.mount / "d" / "top").read_text() == "top"
    assert len(list((place.mount / "many").iterdir())) == 1499
    place.run("umount", str(place.mount))
    place.assert_nothing_is_left(status["pid"])


@pytest.mark.parametrize("options", [[], ["--backend", "erofs"], ["--writable"], ["--writable", "--backend", "erofs"]])
def test_what_a_killed_daemon_leaves_is_recovered(place: Place, options: list[str]) -> None:
    status = place.start("odd", *options)
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: place.state() == "dead")
    with pytest.raises(OSError, match=r"Transport endpoint|Input/output"):
        (place.mount / "large").read_bytes()
    again = place.start("odd", *options)
    assert (place.mount / "d" / "low").read_text() == "low"
    os.kill(again["pid"], signal.SIGKILL)
    wait_until(lambda: place.state() == "dead")
    place.stop(again["pid"])


def test_signals_and_force_end_the_whole_of_it(place: Place) -> None:
    status = place.start("odd", "--backend", "erofs")
    os.kill(status["pid"], signal.SIGTERM)
    wait_until(lambda: top_mount(str(place.mount)) is None)
    place.assert_nothing_is_left(status["pid"])
    status = place.start("odd")
    with open(place.mount / "large", "rb"):
        place.run("umount", str(place.mount), code=40)
        place.run("umount", "--force", str(place.mount))
    place.assert_nothing_is_left(status["pid"])


def test_refusals_leave_nothing(place: Place) -> None:
    place.start("foreign", code=7)
    assert place.start("foreign", "--platform", "linux/s390x")["state"] == "serving"
    place.run("umount", str(place.mount))
    place.start("contradiction", code=10)
    place.start("odd", "--upper", str(place.base), code=2)
    (place.base / "upper").mkdir()
    (place.base / "upper" / "upper").write_text("a file")
    place.start("odd", "--writable", "--upper", str(place.base / "upper"), code=40)
    place.start("odd", "--writable", "--upper", str(place.base / "missing"), code=40)
    assert top_mount(str(place.mount)) is None
    assert list((place.base / "run").iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_cannot_name_files_of_other_layers(place: Place, backend: str) -> None:
    status = place.start("hostile", "--backend", backend)
    if backend == "fuse":
        # The attributes do not reach the kernel.
        assert list((place.mount / "moved").iterdir()) == []
        assert (place.mount / "copy").read_bytes() == b""
    else:
        # The kernel was told not to follow them.
        for name in ("moved", "copy"):
            with pytest.raises(PermissionError):
                (place.mount / name).stat()
    place.stop(status["pid"])


def test_auto_keeps_what_is_unproven_from_the_kernels_parser(place: Place) -> None:
    reference = f"oci:{place.base / 'layout'}:unsigned"
    key = ["-k", str(place.keys.recipient_file), "--allow-unsigned"]
    status = place.run("mount", reference, str(place.mount), *key, "--backend", "auto")
    assert status["backend"] == "fuse"
    place.stop(status["pid"])
    status = place.run("mount", reference, str(place.mount), *key, "--backend", "erofs")
    assert status["backend"] == "erofs"
    place.stop(status["pid"])
