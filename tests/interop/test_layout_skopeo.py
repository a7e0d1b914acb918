"""skopeo as the judge of our layouts: it copies an artifact without changing a byte of the manifest or of any blob."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from encfs.oci.blobs import Descriptor
from encfs.oci.layout import Layout

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT = "application/vnd.encfs.artifact.v1"

pytestmark = pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed")


def skopeo(*arguments: str) -> bytes:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def as_json(blob: Descriptor) -> dict[str, object]:
    return {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}


def write_artifact(layout: Layout, tag: str, seed: int) -> bytes:
    """A manifest of the shape and media types of our artifacts, over random blobs."""
    random_bytes = random.Random(seed)
    config = layout.write_blob(b'{"format":"encfs/1","seed":%d}' % seed, "application/vnd.encfs.content.v1+json")
    kinds = ("keyring.v1+json", "signature.v1+json", "tree.v1", "segment.v1", "segment.v1")
    layers = [layout.write_blob(random_bytes.randbytes(70_000), f"application/vnd.encfs.{kind}") for kind in kinds]
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "artifactType": ARTIFACT,
            "config": as_json(config),
            "layers": [as_json(layer) for layer in layers],
        },
        separators=(",", ":"),
    ).encode()
    layout.put_manifest(manifest, MANIFEST, tag=tag, artifact_type=ARTIFACT)
    return manifest


def test_skopeo_copies_our_layout_unchanged(tmp_path: Path) -> None:
    with_tags = Layout(tmp_path / "ours", create=True)
    manifest = write_artifact(with_tags, "v1", 1)
    write_artifact(with_tags, "v2", 2)
    with_tags.close()
    assert skopeo("inspect", "--raw", f"oci:{tmp_path}/ours:v1") == manifest
    skopeo("copy", f"oci:{tmp_path}/ours:v1", f"oci:{tmp_path}/copy:v1")
    copy = Layout(tmp_path / "copy", tag="v1")
    copied = copy.manifest()
    assert copied.content == manifest
    assert copied.digest == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    document = json.loads(manifest)
    for item in (document["config"], *document["layers"]):
        blob = Descriptor(item["mediaType"], item["digest"], item["size"])
        assert sum(map(len, copy.stream_blob(blob))) == blob.size
    assert copy.tags() == ["v1"]
    copy.close()


def test_we_write_on_in_a_layout_of_skopeo(tmp_path: Path) -> None:
    ours = Layout(tmp_path / "ours", create=True)
    first = write_artifact(ours, "v1", 1)
    ours.close()
    skopeo("copy", f"oci:{tmp_path}/ours:v1", f"oci:{tmp_path}/theirs:v1")
    theirs = Layout(tmp_path / "theirs", create=True)
    second = write_artifact(theirs, "v2", 2)
    theirs.close()
    for tag, manifest in (("v1", first), ("v2", second)):
        assert skopeo("inspect", "--raw", f"oci:{tmp_path}/theirs:{tag}") == manifest
    # And skopeo in one of ours: it must not trip over anything that we leave there.
    skopeo("copy", f"oci:{tmp_path}/ours:v1", f"oci:{tmp_path}/theirs:v3")
    theirs = Layout(tmp_path / "theirs")
    assert theirs.tags() == ["v1", "v2", "v3"]
    theirs.close()
