"""Encrypted container images for tests, made from entries: as `imagetool encrypt IMAGE` makes them from layers."""

from __future__ import annotations

import hashlib
import io
import json
import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from encfs.erofs.writer import Entry, ErofsWriter
from encfs.format.descriptor import (
    ARTIFACT_TYPE,
    CONTENT_TYPE,
    KEYRING_TYPE,
    MANIFEST_TYPE,
    SIGNATURE_TYPE,
    build_content,
    build_manifest,
)
from encfs.format.suite import SUITES
from encfs.format.writer import VolumeOptions, VolumeWriter, WrittenVolume
from encfs.image.merged import MergedTree
from encfs.image.stack import VolumeStack, open_readers
from encfs.keys.keyring import create_keyring
from encfs.keys.payload import build_payload, commitment
from encfs.oci.blobs import BlobSink, Descriptor
from encfs.signatures import sign
from tests.support.artifacts import ARTIFACT_ID, Keys
from tests.support.images import write_image
from tests.support.mounts import FileVolume

DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644
OPAQUE = ((b"trusted.overlay.opaque", b"y"),)

#: Entries of one layer, each with its contents.
Layer = Sequence[tuple[Entry, bytes]]


def directory(path: bytes, *, opaque: bool = False, mode: int = 0o755, **attributes: int) -> tuple[Entry, bytes]:
    return Entry(path, stat.S_IFDIR | mode, xattrs=OPAQUE if opaque else (), **attributes), b""


def file(path: bytes, content: bytes, mode: int = 0o644, **attributes: int) -> tuple[Entry, bytes]:
    return Entry(path, stat.S_IFREG | mode, size=len(content), **attributes), content


def link(path: bytes, target: bytes) -> tuple[Entry, bytes]:
    return Entry(path, stat.S_IFLNK | 0o777, size=len(target), target=target), b""


def hard_link(path: bytes, to: bytes) -> tuple[Entry, bytes]:
    return Entry(path, FILE, link_to=to), b""


def whiteout(path: bytes) -> tuple[Entry, bytes]:
    return Entry(path, stat.S_IFCHR, rdev=0), b""


def diff_id(index: int) -> str:
    return "sha256:" + hashlib.sha256(b"layer %d" % index).hexdigest()


def image_config(layers: int, *, architecture: str = "amd64", **config: object) -> bytes:
    document = {
        "architecture": architecture,
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [diff_id(index) for index in range(layers)]},
    }
    return json.dumps(document).encode()


def make_stack(path: Path, layers: Sequence[Layer]) -> VolumeStack:
    """The images of some layers in plain files of a directory."""
    volumes = []
    for index, layer in enumerate(layers):
        write_image(path / str(index), layer, synthesise_parents=True)
        volumes.append(FileVolume(path / str(index)))
    return VolumeStack(volumes)


def make_tree(path: Path, layers: Sequence[Layer]) -> MergedTree:
    """The tree that they make together."""
    stack = make_stack(path, layers)
    return MergedTree(open_readers(stack.read, [volume.size for volume in stack.volumes]))


def write_volume(sink: BlobSink, layer: Layer, name: str) -> WrittenVolume:
    """One layer as a volume of this name."""
    writer = VolumeWriter(sink, VolumeOptions(suite=SUITES["blake3"]))
    try:
        with ErofsWriter(writer, uuid=bytes(16), synthesise_parents=True) as image:
            for entry, content in layer:
                image.add(entry, io.BytesIO(content))
            image.finish()
        written = writer.finish()
    finally:
        writer.abort()
    return replace(written, secret=replace(written.secret, name=name))


def encrypt_image(
    sink: BlobSink,
    layers: Sequence[Layer],
    keys: Keys,
    config: bytes,
    *,
    tag: str | None = "v1",
    signed: bool = True,
    flat: bool = False,
    auxiliary: bool = True,
) -> Descriptor:
    """An artifact with a volume for each layer, lowest first; with `auxiliary` others that nobody may need to mount."""
    names = ["rootfs"] if flat else [f"layer/{diff_id(index)}" for index in range(len(layers))]
    volumes = [write_volume(sink, layer, name) for layer, name in zip(layers, names, strict=True)]
    if auxiliary:
        volumes += [write_volume(sink, [directory(b"")], f"tar/{diff_id(index)}") for index in range(len(layers))]
    payload = build_payload([volume.secret for volume in volumes], config)
    content = build_content(
        artifact_id=ARTIFACT_ID,
        version=1,
        created="2026-01-01T00:00:00Z",
        suite=SUITES["blake3"],
        payload_commitment=commitment(payload),
        volumes=[volume.descriptor for volume in volumes],
    )
    keyring = sink.write_blob(create_keyring(payload, content.digest, [keys.public]), KEYRING_TYPE)
    sink.write_blob(content.content, CONTENT_TYPE)
    signatures = [sink.write_blob(sign(content.content, keys.signer), SIGNATURE_TYPE)] if signed else []
    manifest = build_manifest(content, keyring, signatures)
    return sink.put_manifest(manifest, MANIFEST_TYPE, tag=tag, artifact_type=ARTIFACT_TYPE)
