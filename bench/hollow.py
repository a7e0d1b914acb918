"""An artifact of any size, made in seconds: sealed for real where the image holds metadata, and holes elsewhere.

Descriptor, tree, keyring and manifest are what `imagetool encrypt` would write, the segments have their full size, and
their frames tile them. But a frame of file contents is a hole under an arbitrary leaf hash: reading it fails, as it
must. Good for measuring how long mounting takes; nothing here is of use elsewhere.
"""

from __future__ import annotations

import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from encfs.erofs.writer import Entry, ErofsWriter
from encfs.format.descriptor import (
    ARTIFACT_TYPE,
    CONTENT_TYPE,
    KEYRING_TYPE,
    MANIFEST_TYPE,
    TREE_TYPE,
    SegmentDescriptor,
    VolumeDescriptor,
    build_content,
    build_manifest,
)
from encfs.format.frames import DEFAULT_FRAME_SIZE, TAG_SIZE, FrameCipher, FrameGeometry
from encfs.format.suite import BLAKE3, HASH_SIZE, KEY_SIZE, VOLUME_ID_SIZE
from encfs.format.tree import FrameLocation, RootInput, leaf_hash, pack_entry, write_tree
from encfs.format.writer import DEFAULT_SEGMENT_SIZE
from encfs.keys.files import load_recipient_key
from encfs.keys.keyring import create_keyring
from encfs.keys.payload import VolumeSecret, build_payload, commitment
from encfs.oci.layout import Layout

_ROOM = 4 << 20
#: Bytes of metadata that `ErofsReader` reads in one piece.
_WINDOW = 64 << 10
#: The one file that can be read, where it is asked for; it lies behind all others.
PROBE_NAME, PROBE_SIZE, PROBE_BYTE = "probe", 256 << 10, b"p"


class _HollowData:
    """File contents that are never made: says that a buffer was filled."""

    def __init__(self, image: _Image, size: int) -> None:
        self._image = image
        self._left = size

    def readinto(self, buffer: memoryview, /) -> int:
        size = min(len(buffer), self._left)
        self._left -= size
        self._image.hollow = True
        return size


class _RealData:
    """File contents that are sealed for real."""

    def __init__(self, size: int) -> None:
        self._left = size

    def readinto(self, buffer: memoryview, /) -> int:
        size = min(len(buffer), self._left)
        self._left -= size
        buffer[:size] = PROBE_BYTE * size
        return size


class _Image:
    """Where the EROFS image goes: frames with metadata are kept, the rest is only counted (`ImageSink`)."""

    def __init__(self) -> None:
        self.position = 0
        self.hollow = False
        self.frames: dict[int, bytearray] = {}
        self._room = memoryview(bytearray(_ROOM))

    def buffer(self) -> memoryview:
        return self._room

    def advance(self, size: int) -> None:
        if self.hollow:
            self.hollow = False
            self.position += size
        else:
            self.write(self._room[:size])

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            index, start = divmod(self.position, DEFAULT_FRAME_SIZE)
            part = view[: DEFAULT_FRAME_SIZE - start]
            self.frames.setdefault(index, bytearray(DEFAULT_FRAME_SIZE))[start : start + len(part)] = part
            self.position += len(part)
            view = view[len(part) :]

    def complete(self) -> None:
        """Have whole windows of metadata, as the reader asks for them: what is not metadata in them is zeros."""
        step = _WINDOW // DEFAULT_FRAME_SIZE
        for index in list(self.frames):
            for neighbour in range(index // step * step, index // step * step + step):
                self.frames.setdefault(neighbour, bytearray(DEFAULT_FRAME_SIZE))

    def set_head(self, data: bytes) -> None:
        self.frames[0][: len(data)] = data


def make_hollow_artifact(path: Path, size: int, files: int, public_key: Path, *, probe: bool = False) -> None:
    """A layout at `path`, tag `bench`, with `files` files that make up `size` bytes; segments are sparse files.

    `probe` adds a file that can be read.
    """
    image = _Image()
    with ErofsWriter(image, uuid=bytes(16)) as writer:
        writer.add(Entry(b"", stat.S_IFDIR | 0o755))
        for number in range(files):
            entry = Entry(b"part-%06d" % number, stat.S_IFREG | 0o644, size=size // files)
            writer.add(entry, _HollowData(image, entry.size))
        if probe:
            writer.add(Entry(PROBE_NAME.encode(), stat.S_IFREG | 0o644, size=PROBE_SIZE), _RealData(PROBE_SIZE))
        writer.finish()
    image.complete()
    layout = Layout(path, create=True)
    try:
        volume, secret = _write_volume(image, layout, path / "blobs" / "sha256")
        payload = build_payload([secret])
        content = build_content(
            artifact_id="bench",
            version=0,
            created="2026-01-01T00:00:00Z",
            suite=BLAKE3,
            payload_commitment=commitment(payload),
            volumes=[volume],
        )
        recipients = [load_recipient_key(public_key)]
        keyring = layout.write_blob(create_keyring(payload, content.digest, recipients), KEYRING_TYPE)
        layout.write_blob(content.content, CONTENT_TYPE)
        manifest = build_manifest(content, keyring, [])
        layout.put_manifest(manifest, MANIFEST_TYPE, tag="bench", artifact_type=ARTIFACT_TYPE)
    finally:
        layout.close()


def _write_volume(image: _Image, layout: Layout, blobs: Path) -> tuple[VolumeDescriptor, VolumeSecret]:
    volume_id, key = secrets.token_bytes(VOLUME_ID_SIZE), secrets.token_bytes(KEY_SIZE)
    cipher = FrameCipher(BLAKE3, volume_id, key)
    geometry = FrameGeometry(image.position, DEFAULT_FRAME_SIZE)
    arbitrary = secrets.token_bytes(HASH_SIZE)
    segments: list[SegmentDescriptor] = []
    with tempfile.TemporaryFile() as leaves:
        for number, (first, stop) in enumerate(_segment_ranges(geometry.count)):
            # A segment's digest is never checked by a mount; a true one would mean hashing its holes.
            digest = secrets.token_hex(HASH_SIZE)
            with (blobs / digest).open("wb") as segment:
                offset = 0
                for index in range(first, stop):
                    length = geometry.length(index)
                    stored, leaf = length + TAG_SIZE, arbitrary
                    if index in image.frames:
                        sealed = memoryview(bytearray(stored))
                        cipher.seal_into(index, memoryview(image.frames[index])[:length], length, 0, sealed)
                        leaf = leaf_hash(BLAKE3, index, sealed)
                        segment.seek(offset)
                        segment.write(sealed)
                    leaves.write(pack_entry(FrameLocation(leaf, offset, stored, number, 0)))
                    offset += stored
                segment.truncate(offset)
            segments.append(SegmentDescriptor(f"sha256:{digest}", offset, stop - first))
        sizes = [segment.size for segment in segments]
        fields = RootInput(BLAKE3, volume_id, DEFAULT_FRAME_SIZE, geometry.size, geometry.count, sizes)
        tree = layout.create_blob()
        try:
            root = write_tree(fields, leaves, tree)
            blob = tree.commit(TREE_TYPE)
        finally:
            tree.abort()
    descriptor = VolumeDescriptor(
        id=volume_id,
        kind="erofs",
        size=geometry.size,
        frame_size=geometry.frame_size,
        frames=geometry.count,
        root=root,
        tree_digest=blob.digest,
        tree_size=blob.size,
        segments=tuple(segments),
    )
    return descriptor, VolumeSecret(volume_id, key)


def _segment_ranges(frames: int) -> Iterator[tuple[int, int]]:
    step = DEFAULT_SEGMENT_SIZE // (DEFAULT_FRAME_SIZE + TAG_SIZE)
    for first in range(0, frames, step):
        yield first, min(first + step, frames)
