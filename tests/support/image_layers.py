"""Layers of container images made for tests; their encryption, as the commands do it, and the way back."""

from __future__ import annotations

import io
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
from encfs.format.writer import VolumeOptions
from encfs.image.compression import Compression
from encfs.image.manifest import Platform
from encfs.keys.providers import provider_from_uri
from encfs.oci.layout import Layout
from encfs.oci.options import StoreOptions
from encfs.oci.reference import parse_reference
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from imagetool.pipeline.decrypt_image import RestoredImage, restore_image
from imagetool.pipeline.encrypt_image import ImageOptions, ImagesResult, encrypt_images
from imagetool.sources.stored import opened_images
from tests.support.artifacts import ARTIFACT_ID, Keys

needs_umoci = pytest.mark.skipif(not shutil.which("umoci"), reason="umoci is not installed")
needs_skopeo = pytest.mark.skipif(not shutil.which("skopeo"), reason="skopeo is not installed")


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
