"""Artifacts for tests: a small tree, keys, and an encryption of the one for the other."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from encfs.format.suite import SUITES
from encfs.format.writer import DEFAULT_SEGMENT_SIZE, VolumeOptions
from encfs.keys.files import write_key_files
from encfs.keys.jwk import PrivateKey, PublicKey, generate_key
from encfs.oci.blobs import BlobSink
from encfs.progress import NoProgress
from imagetool.pipeline.encrypt import EncryptOptions, EncryptResult, encrypt

ARTIFACT_ID = "acme/model"


@dataclass(frozen=True, slots=True)
class Keys:
    """One recipient with its key file, and one signer."""

    recipient: PrivateKey
    recipient_file: Path
    signer: PrivateKey

    @property
    def public(self) -> PublicKey:
        return self.recipient.public

    @property
    def verifier(self) -> PublicKey:
        return self.signer.public


def make_keys(directory: Path) -> Keys:
    """An X25519 recipient in a file, and an Ed25519 signer."""
    recipient, signer = generate_key("x25519"), generate_key("ed25519")
    assert isinstance(recipient, PrivateKey)
    assert isinstance(signer, PrivateKey)
    write_key_files(recipient, directory / "recipient.jwk")
    return Keys(recipient, directory / "recipient.jwk", signer)


def make_small_tree(path: Path) -> Path:
    """A few files of telling sizes, a directory and a link."""
    path.mkdir()
    (path / "empty").touch()
    (path / "small.txt").write_bytes(b"the quick brown fox\n")
    (path / "block.bin").write_bytes(os.urandom(4096))
    (path / "sub").mkdir()
    (path / "sub" / "odd.bin").write_bytes(os.urandom(5001))
    (path / "link").symlink_to("sub/odd.bin")
    return path


def encrypt_tree(
    source: Path,
    sink: BlobSink,
    keys: Keys,
    *,
    tag: str | None = "v1",
    version: int = 1,
    hash_name: str = "blake3",
    frame_size: int = 65536,
    compress: bool = False,
    segment_size: int = DEFAULT_SEGMENT_SIZE,
    signed: bool = True,
) -> EncryptResult:
    """Encrypt for `keys`, signed unless asked not to."""
    volume = VolumeOptions(suite=SUITES[hash_name], frame_size=frame_size, compress=compress, segment_size=segment_size)
    return encrypt(
        source,
        sink,
        [keys.public],
        signers=[keys.signer] if signed else [],
        options=EncryptOptions(ARTIFACT_ID, version, volume),
        tag=tag,
        progress=NoProgress(),
    )
