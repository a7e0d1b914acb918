"""Golden artifacts of the format encfs/1 (fixtures/README.md): read by the library, and by a second implementation.

The second one is written from the format alone, with jwcrypto for the keyring, and shares no code with the first: what
both read alike is in the bytes, and not in a misunderstanding that writer and reader share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import struct
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jwcrypto import jwe, jwk

from encfs.artifact import load_artifact, open_artifact
from encfs.erofs.reader import ErofsReader
from encfs.errors import WrongKeyError
from encfs.keys.files import load_trusted_key
from encfs.keys.providers import provider_from_uri
from encfs.oci.layout import Layout
from encfs.progress import NoProgress
from encfs.trust import TrustPolicy
from imagetool.pipeline.check import verify
from tests.support.images import fsck, kernel_mount
from tests.support.trees import Node, scan_image, scan_tree

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
ID = "encfs.example/golden"
ARTIFACTS = {"blake3": 1, "sha256": 2, "zstd": 3}
RECIPIENTS = ("x25519", "p256", "p384", "rsa3072", "oct", "mlkem768x25519", "passphrase")
#: jwcrypto has no types.
JWE: Any = jwe.JWE
JWK: Any = jwk.JWK
SIGNERS = ("ed25519", "p256", "mldsa65")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The key files with the mode that git does not keep."""
    directory = tmp_path_factory.mktemp("keys")
    for file in (GOLDEN / "test-keys").iterdir():
        shutil.copyfile(file, directory / file.name)
        (directory / file.name).chmod(0o600)
    return directory


def key_uri(keys: Path, recipient: str) -> str:
    return f"passphrase:file={keys}/passphrase.txt" if recipient == "passphrase" else f"file:{keys}/{recipient}.jwk"


def listing(nodes: dict[bytes, Node], read: Callable[[bytes], bytes]) -> dict[str, object]:
    """Nodes in the form of expected.json; `read` gives the contents of a file."""
    result: dict[str, object] = {}
    for path, node in sorted(nodes.items()):
        xattrs = {key.decode(): value.hex() for key, value in node.xattrs.items() if key.startswith(b"user.")}
        entry: dict[str, object] = {
            "mode": oct(node.mode),
            "uid": node.uid,
            "gid": node.gid,
            "mtime_ns": node.mtime_ns,
            "xattrs": xattrs,
        }
        if stat.S_ISREG(node.mode):
            entry |= {"size": node.size, "sha256": hashlib.sha256(read(path)).hexdigest()}
        if stat.S_ISLNK(node.mode):
            entry["target"] = node.target.decode()
        if stat.S_ISCHR(node.mode):
            entry["rdev"] = [node.rdev >> 8 & 0xFFF, node.rdev & 0xFF]
        if not stat.S_ISDIR(node.mode):
            entry["nlink"] = node.nlink
        result[path.decode("utf-8", "backslashreplace")] = entry
    return result


def image_listing(reader: ErofsReader) -> dict[str, object]:
    def read(path: bytes) -> bytes:
        inode = reader.resolve(path, follow=False)
        return reader.read(inode, 0, inode.size)

    return listing(scan_image(reader, contents=False), read)


# -- the library


@pytest.mark.parametrize("recipient", RECIPIENTS)
@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_recipient_reads_the_whole_tree(expected: dict[str, Any], keys: Path, name: str, recipient: str) -> None:
    layout = Layout(GOLDEN / name, tag="golden")
    trust = TrustPolicy(pin=expected[name]["content_digest"])
    with open_artifact(layout, keys=[provider_from_uri(key_uri(keys, recipient))], trust=trust) as artifact:
        [volume] = artifact.volumes
        assert artifact.content_digest == expected[name]["content_digest"]
        assert artifact.content.volumes[0].root.hex() == expected[name]["root"]
        assert volume.size == expected[name]["image_size"]
        assert image_listing(ErofsReader(volume.read, volume.size)) == expected["tree"]
    layout.close()


@pytest.mark.parametrize("signer", SIGNERS)
@pytest.mark.parametrize("name", ARTIFACTS)
def test_every_signature_vouches(expected: dict[str, Any], keys: Path, name: str, signer: str) -> None:
    layout = Layout(GOLDEN / name)
    key = load_trusted_key(keys / f"sign-{signer}.jwk.pub")
    trust = TrustPolicy(keys=(key,), artifact_id=ID, min_version=ARTIFACTS[name])
    result = verify(layout, trust=trust, progress=NoProgress())
    layout.close()
    assert result.origin is not None
    assert result.origin.signer == key.kid
    assert result.artifact.manifest.digest == expected[name]["manifest_digest"]
    assert result.artifact.content.created == "2026-01-01T00:00:00Z"


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_key_of_the_same_kind_does_not_open_it(keys: Path, name: str) -> None:
    """The key that signed with P-256 is a P-256 key, but no recipient."""
    layout = Layout(GOLDEN / name)
    loaded = load_artifact(layout)
    with pytest.raises(WrongKeyError):
        loaded.keyring.open([provider_from_uri(f"file:{keys}/sign-p256.jwk")])
    layout.close()


def test_no_name_and_no_content_is_in_clear(expected: dict[str, Any]) -> None:
    names = [name for path in expected["tree"] for name in path.split("/") if len(name) > 8]
    assert "repetitive.txt" in names
    for name in ARTIFACTS:
        for file in (GOLDEN / name).rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert not [item for item in names if item.encode() in content]
                assert b"line 00" not in content
                assert b'layers": 2' not in content


# -- a second implementation

_ENTRY = struct.Struct(">32s Q I H H")


def _read_artifact(layout: Path, key: Any) -> bytes:
    """The plaintext image of an artifact, every hash checked. For one volume in one segment."""

    def blob(descriptor: dict[str, Any]) -> bytes:
        content: bytes = (layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()
        assert f"sha256:{hashlib.sha256(content).hexdigest()}" == descriptor["digest"]
        assert len(content) == descriptor["size"]
        return content

    [entry] = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads(blob(entry))
    assert manifest["artifactType"] == "application/vnd.encfs.artifact.v1"
    content = json.loads(blob(manifest["config"]))
    assert content["format"] == "encfs/1"
    [keyring] = [item for item in manifest["layers"] if item["mediaType"] == "application/vnd.encfs.keyring.v1+json"]
    payload = _open_keyring(blob(keyring), manifest["config"]["digest"], key)
    commitment = hashlib.sha256(b"encfs/1 payload\0" + payload).hexdigest()
    assert content["payload_commitment"] == f"sha256:{commitment}"
    [volume], [secret] = content["volumes"], json.loads(payload)["volumes"]
    assert volume["id"] == secret["id"]
    volume_key = urlsafe_b64decode(secret["key"] + "=")
    return _read_volume(content["suite"], volume, volume_key, blob(volume["tree"]), blob(volume["segments"][0]))


def _open_keyring(keyring: bytes, digest: str, key: Any) -> bytes:
    message = JWE(algs=["ECDH-ES+A256KW", "RSA-OAEP-256", "A256KW", "PBES2-HS512+A256KW", "A256GCM"])
    # The recipients of an algorithm that jwcrypto does not know would make it give up.
    document = json.loads(keyring)
    document["recipients"] = [item for item in document["recipients"] if not item["header"]["alg"].startswith("HPKE")]
    message.deserialize(json.dumps(document))
    message.decrypt(key)
    assert message.objects["aad"] == digest.encode()
    return bytes(message.payload)


def _read_volume(suite: dict[str, str], volume: dict[str, Any], key: bytes, tree: bytes, segment: bytes) -> bytes:
    number = {"blake3": 1, "sha256": 2}[suite["hash"]]
    hashes: dict[str, Callable[[bytes], Any]] = {"blake3": blake3, "sha256": hashlib.sha256}
    new_hash = hashes[suite["hash"]]
    assert (suite["aead"], suite["kdf"]) == ("AES-256-GCM", "HKDF-SHA256")
    volume_id, frames = bytes.fromhex(volume["id"]), volume["frames"]
    assert frames <= 128  # one node
    assert len(tree) == frames * _ENTRY.size
    top = new_hash(tree + struct.pack(">B Q B", 0, 0, 1)).digest()
    fields = (top, number, volume_id, volume["frame_size"], volume["size"], frames, 1, len(segment), 2)
    assert new_hash(struct.pack(">32s B 16s I Q Q I Q B", *fields)).hexdigest() == volume["root"]

    aead = AESGCM(HKDF(SHA256(), 32, salt=volume_id, info=b"encfs/1 frame key").derive(key))
    image = b""
    for index in range(frames):
        leaf, offset, stored, segment_number, flags = _ENTRY.unpack_from(tree, index * _ENTRY.size)
        assert segment_number == 0
        frame = segment[offset : offset + stored]
        assert new_hash(frame + struct.pack(">Q B", index, 0)).digest() == leaf
        length = min(volume["frame_size"], volume["size"] - index * volume["frame_size"])
        aad = struct.pack(">14s B B 16s Q I", b"encfs/1 frame\0", number, flags, volume_id, index, length)
        body = aead.decrypt(struct.pack(">4x Q", index), frame, aad)
        if flags & 1:
            (size,) = struct.unpack_from(">I", body)
            assert not any(body[4 + size :])
            body = zstandard.ZstdDecompressor().decompress(body[4 : 4 + size], max_output_size=length)
        assert len(body) == length
        image += body
    return image


@pytest.mark.parametrize("recipient", ["x25519", "p256", "p384", "rsa3072", "oct", "passphrase"])
@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_second_implementation_reads_the_same_image(
    monkeypatch: pytest.MonkeyPatch, keys: Path, name: str, recipient: str
) -> None:
    if recipient == "passphrase":
        monkeypatch.setattr("jwcrypto.jwa.default_max_pbkdf2_iterations", 600_000)
        key = JWK.from_password((keys / "passphrase.txt").read_text().strip())
    else:
        key = JWK.from_json((keys / f"{recipient}.jwk").read_text())
    layout = Layout(GOLDEN / name)
    uri = key_uri(keys, "oct")
    with open_artifact(layout, keys=[provider_from_uri(uri)], trust=TrustPolicy(allow_unsigned=True)) as artifact:
        [volume] = artifact.volumes
        assert bytes(volume.read(0, volume.size)) == _read_artifact(GOLDEN / name, key)
    layout.close()


@pytest.mark.parametrize("name", ARTIFACTS)
def test_signatures_are_dsse_over_the_descriptor(keys: Path, name: str) -> None:
    """DSSE's pre-authentication encoding done by hand, the Ed25519 signature checked by `cryptography` alone."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    members = json.loads((keys / "sign-ed25519.jwk.pub").read_text())
    public = Ed25519PublicKey.from_public_bytes(urlsafe_b64decode(members["x"] + "="))
    layout = Layout(GOLDEN / name)
    loaded = load_artifact(layout)
    layout.close()
    envelopes = [json.loads(item) for item in loaded.signatures]
    [envelope] = [item for item in envelopes if item["signatures"][0]["keyid"] == members["kid"]]
    payload = loaded.content.content
    assert b64decode(envelope["payload"]) == payload
    kind = envelope["payloadType"].encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    public.verify(b64decode(envelope["signatures"][0]["sig"]), message)


@pytest.mark.root
def test_kernel_and_fsck_agree_on_the_decrypted_image(expected: dict[str, Any], keys: Path, tmp_path: Path) -> None:
    for name in ARTIFACTS:
        image = tmp_path / f"{name}.erofs"
        image.write_bytes(_read_artifact(GOLDEN / name, JWK.from_json((keys / "oct.jwk").read_text())))
        fsck(image)
        with kernel_mount(image, tmp_path / "mounted") as mounted:
            found = listing(scan_tree(mounted, contents=False), partial(_contents, os.fsencode(mounted)))
            assert found == expected["tree"]


def _contents(base: bytes, path: bytes) -> bytes:
    with open(base + b"/" + path, "rb") as file:
        return file.read()
