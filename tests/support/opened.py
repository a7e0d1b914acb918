"""Artifacts in a layout, opened by `encfs.open` as a user of the library would."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import encfs
from encfs.api import Artifact
from encfs.format.descriptor import SEGMENT_TYPE, parse_manifest
from encfs.keys.files import write_key_files
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID, encrypt_tree, make_keys


@dataclass(frozen=True, slots=True)
class Stored:
    """A signed artifact in a layout, and what a consumer needs to open it."""

    layout: Path
    reference: str
    options: dict[str, Any]

    def open(self, **options: Any) -> Artifact:
        return encfs.open(self.reference, **(self.options | options))

    def flip_byte(self, segment: int, offset: int) -> None:
        """Change one stored byte in place."""
        layout = Layout(str(self.layout), tag="v1")
        blobs = [blob for blob in parse_manifest(layout.manifest().content).blobs if blob.media_type == SEGMENT_TYPE]
        layout.close()
        path = self.layout / "blobs" / "sha256" / blobs[segment].digest.removeprefix("sha256:")
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.seek(offset)
            (byte,) = file.read(1)
            file.seek(offset)
            file.write(bytes([byte ^ 1]))


def store_tree(tree: Path, directory: Path, *, frame_size: int = 65536) -> Stored:
    """Encrypt `tree` into a layout in `directory`."""
    keys = make_keys(directory)
    write_key_files(keys.signer, directory / "signer.jwk")
    layout = Layout(str(directory / "store"), tag="v1", create=True)
    encrypt_tree(tree, layout, keys, frame_size=frame_size)
    layout.close()
    options = {
        "key": str(keys.recipient_file),
        "trust": directory / "signer.jwk.pub",
        "id": ARTIFACT_ID,
        "min_version": 1,
    }
    return Stored(directory / "store", f"oci:{directory / 'store'}:v1", options)
