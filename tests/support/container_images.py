"""Small container images in OCI layouts, keys for ocicrypt, and skopeo to judge what comes out."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from encfs.image.compression import Compression
from encfs.image.manifest import (
    CONFIG_TYPE,
    INDEX_TYPE,
    MANIFEST_TYPE,
    ImageManifest,
    parse_image,
)
from encfs.oci.blobs import Descriptor
from encfs.oci.layout import Layout
from encfs.oci.reference import parse_reference
from encfs.oci.store import open_sink, open_source
from encfs.progress import NoProgress
from imagetool.ocicrypt.images import DecryptOptions, decrypt_image, encrypt_image
from imagetool.ocicrypt.keys import parse_opener, parse_recipient
from imagetool.ocicrypt.rewriting import ImageResult

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_COMPRESS: Mapping[Compression, Callable[[bytes], bytes]] = {
    Compression.NONE: bytes,
    Compression.GZIP: lambda data: gzip.compress(data, 1, mtime=0),
    Compression.ZSTD: lambda data: zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data),
}


def archive(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def layer_type(compression: Compression) -> str:
    return f"{LAYER_TYPE}+{compression.value}" if compression.value else LAYER_TYPE


def descriptor_json(blob: Descriptor) -> dict[str, Any]:
    document: dict[str, Any] = {"mediaType": blob.media_type, "digest": blob.digest, "size": blob.size}
    return document | ({"annotations": dict(blob.annotations)} if blob.annotations else {})


@dataclass(frozen=True)
class Store:
    """An OCI layout directory."""

    path: Path

    def reference(self, tag: str) -> str:
        return f"oci:{self.path}:{tag}"

    def manifest(self, tag: str) -> ImageManifest:
        with closing(Layout(self.path, tag=tag)) as layout:
            image = parse_image(layout.document())
        assert isinstance(image, ImageManifest)
        return image

    def blob(self, digest: str) -> bytes:
        content = (self.path / "blobs" / digest.replace(":", "/")).read_bytes()
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == digest
        return content

    def plain_layers(self, tag: str) -> list[bytes]:
        return [self.blob(layer.digest) for layer in self.manifest(tag).layers]

    def tags(self) -> list[str]:
        if not self.path.exists():
            return []
        with closing(Layout(self.path)) as layout:
            return layout.tags()

    def blobs(self) -> set[str]:
        return set(os.listdir(self.path / "blobs" / "sha256")) if self.path.exists() else set()

    def add(self, content: bytes, media_type: str) -> Descriptor:
        with closing(Layout(self.path, create=True)) as layout:
            return layout.write_blob(content, media_type)

    def put(self, document: Mapping[str, Any], tag: str | None) -> Descriptor:
        with closing(Layout(self.path, create=True)) as layout:
            return layout.put_manifest(
                json.dumps(document, separators=(",", ":")).encode(), document["mediaType"], tag=tag
            )

    def change(self, tag: str, change: Callable[[dict[str, Any]], None], *, new_tag: str = "changed") -> str:
        """Write a changed copy of a manifest under another tag; its reference."""
        document = json.loads(json.dumps(self.manifest(tag).document))
        change(document)
        self.put(document, new_tag)
        return self.reference(new_tag)


def make_image(
    store: Store,
    tag: str | None,
    layers: Sequence[tuple[bytes, Compression]],
    *,
    architecture: str = "amd64",
    diff_ids: Sequence[str] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Descriptor:
    """An image of the given tar archives, lowest first."""
    blobs = [store.add(_COMPRESS[kind](content), layer_type(kind)) for content, kind in layers]
    true = [f"sha256:{hashlib.sha256(content).hexdigest()}" for content, _ in layers]
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/bin/true"], "Env": ["SECRET=no"]},
        "rootfs": {"type": "layers", "diff_ids": list(true if diff_ids is None else diff_ids)},
    }
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor_json(store.add(json.dumps(config).encode(), CONFIG_TYPE)),
        "layers": [descriptor_json(blob) for blob in blobs],
        "annotations": dict(annotations or {"org.example.kept": "yes"}),
    }
    return store.put(document, tag)


def make_index(store: Store, tag: str, images: Mapping[str, Sequence[tuple[bytes, Compression]]]) -> None:
    """An index of images by architecture, with an attestation of the first one."""
    entries: list[dict[str, Any]] = []
    for architecture, layers in images.items():
        manifest = make_image(store, f"{tag}-{architecture}", layers, architecture=architecture)
        entries.append(descriptor_json(manifest) | {"platform": {"os": "linux", "architecture": architecture}})
    attestation = make_image(
        store, f"{tag}-attestation", [(archive({"sbom": b"about the plain image"}), Compression.NONE)]
    )
    entries.append(
        descriptor_json(attestation)
        | {
            "platform": {"os": "unknown", "architecture": "unknown"},
            "annotations": {
                "vnd.docker.reference.type": "attestation-manifest",
                "vnd.docker.reference.digest": entries[0]["digest"],
            },
        }
    )
    store.put({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}, tag)


@dataclass(frozen=True)
class KeyPair:
    """Files of a key, PEM."""

    public: Path
    private: Path


def make_key(directory: Path, kind: str) -> KeyPair:
    """`rsa` (2048 bits), or the name of a curve: `p256`, `p384`, `p521`."""
    curves = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
    key = rsa.generate_private_key(65537, 2048) if kind == "rsa" else ec.generate_private_key(curves[kind])
    pair = KeyPair(directory / f"{kind}.pub.pem", directory / f"{kind}.pem")
    pair.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    pair.private.touch(0o600)
    pair.private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pair


def make_certificate(directory: Path, name: str = "holder") -> KeyPair:
    """A self-signed certificate of an RSA key, and the key."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pair = KeyPair(directory / f"{name}.crt", directory / f"{name}.key")
    pair.public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pair.private.touch(0o600)
    pair.private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return pair


needs_gpg = pytest.mark.skipif(shutil.which("gpg") is None, reason="gpg is not installed")


@contextmanager
def gnupg(home: Path, address: str) -> Iterator[Path]:
    """A keyring with one key, whose secret half is in the file that is given; its agent ends with the block."""
    home.mkdir(mode=0o700)

    def run(program: str, *words: str) -> bytes:
        done = subprocess.run([program, "--homedir", str(home), *words], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    run("gpg", "--batch", "--passphrase", "", "--quick-gen-key", address, "rsa2048", "encr", "never")
    secret = home / "secret.key"
    secret.write_bytes(run("gpg", "--batch", "--export-secret-keys", address))
    try:
        yield secret
    finally:
        run("gpgconf", "--kill", "all")


def run_encrypt(source: str, destination: str, recipients: Sequence[object], **options: Any) -> ImageResult:
    """`encrypt_image` between two references, as the command does it."""
    target = parse_reference(destination)
    with closing(open_source(parse_reference(source))) as origin, closing(open_sink(target)) as sink:
        parsed = [parse_recipient(str(recipient)) for recipient in recipients]
        return encrypt_image(origin, sink, parsed, tag=target.tag, progress=NoProgress(), **options)


def run_decrypt(source: str, destination: str, keys: Sequence[object], **options: Any) -> ImageResult:
    """`decrypt_image` between two references, as the command does it."""
    target = parse_reference(destination)
    options.setdefault("options", DecryptOptions())
    with closing(open_source(parse_reference(source))) as origin, closing(open_sink(target)) as sink:
        openers = [parse_opener(str(key)) for key in keys]
        return decrypt_image(origin, sink, openers, tag=target.tag, progress=NoProgress(), **options)


def skopeo(*arguments: object, check: bool = True, env: Mapping[str, str] | None = None) -> str:
    """Run skopeo; what it printed on either stream."""
    done = subprocess.run(
        ["skopeo", "--insecure-policy", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(os.environ) | dict(env or {}),
    )
    assert (done.returncode == 0) is check, done.stdout + done.stderr
    return done.stdout + done.stderr


def skopeo_copy(source: str, destination: str, *options: object, **more: Any) -> str:
    """`skopeo copy` that leaves layers as they are compressed."""
    return skopeo("copy", "--dest-oci-accept-uncompressed-layers", *options, source, destination, **more)
