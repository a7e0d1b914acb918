"""Keys that never leave a TPM (swtpm): what they open, under which policy, and what a changed file comes to."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from encfs.encoding import b64_encode
from encfs.errors import ConflictError, KeyFileError, KeyProviderError, KeyRefusedError, UsageError, WrongKeyError
from encfs.keys import jwk
from encfs.keys.files import load_recipient_key
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers.tpm2 import Tpm2Provider
from encfs.tpm import structures
from encfs.tpm.keyfile import load_object
from encfs.tpm.resident import ResidentKey
from tests.integration.test_tpm_sealing import ok, refused
from tests.support.tpm import SoftwareTpm, software_tpm, tpm

__all__ = ["tpm"]

DIGEST = "sha256:" + "5a" * 32


@pytest.mark.parametrize("kind", structures.RESIDENT_KINDS)
def test_a_shared_secret_or_key_of_every_kind(
    tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ok("imagetool", "keygen", "-o", "one.tpm", "--tpm2", "--type", kind, "--tpm2-pcrs", "sha256:7")
    assert opened("one.tpm", "one.tpm.pub") == b"secret"
    # A file under the name of another kind is none.
    document = json.loads(Path("one.tpm").read_text())
    public = bytearray(base64.b64decode(document["public"]))
    public[-1] ^= 1
    Path("two.tpm").write_text(json.dumps(document | {"public": b64_encode(bytes(public))}))
    Path("two.tpm").chmod(0o600)
    with pytest.raises((KeyFileError, KeyProviderError, WrongKeyError)):
        opened("two.tpm", "one.tpm.pub")


@pytest.fixture
def place(tmp_path: Path, tpm: SoftwareTpm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a P-256 key of the TPM's in `machine.tpm`, for PCRs 7 and 11."""
    monkeypatch.chdir(tmp_path)
    tpm.extend(7)
    tpm.extend(11)
    ok("imagetool", "keygen", "-o", "machine.tpm", "--tpm2", "--tpm2-pcrs", "sha256:7,11")
    return tmp_path


def opened(path: str = "machine.tpm", recipient: str = "machine.tpm.pub") -> bytes:
    """A keyring for the public half, opened in the TPM."""
    keyring = create_keyring(b"secret", DIGEST, [load_recipient_key(recipient)])
    return bytes(parse_keyring(keyring, DIGEST).open([Tpm2Provider(path)]))


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa2048", "rsa3072"])
def test_an_artifact_for_a_machine(
    tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("imagetool", "keygen", "-o", "one.tpm", "--tpm2", "--type", kind, "--tpm2-pcrs", "sha256:7")
    made = json.loads(ok(*words, "--json"))
    assert (made["type"], made["public"]) == (kind, "one.tpm.pub")
    assert list(made["policy"]["pcrs"]["values"]) == ["7"]
    assert made["kid"] == load_recipient_key("one.tpm.pub").kid
    Path("data").mkdir()
    Path("data/file").write_bytes(b"content")
    ok("imagetool", "encrypt", "data", "oci:a:t", "-r", "one.tpm.pub")
    pin = json.loads(ok("imagetool", "inspect", "oci:a:t", "--json"))["content_digest"]
    assert ok("encfs", "cat", "oci:a:t", "file", "-k", "tpm2:one.tpm", "--pin", pin) == "content"
    tpm.extend(7)
    message = refused(KeyRefusedError, "encfs", "cat", "oci:a:t", "file", "-k", "tpm2:one.tpm", "--pin", pin)
    assert "PCR 7 (sha256) differ" in message
    assert tpm.transient() == ""


def test_the_shared_secret_is_that_of_ecdh(place: Path) -> None:
    # Often enough to meet a secret that begins with zero would take long; what comes back is compared in full.
    public = load_recipient_key("machine.tpm.pub")
    assert isinstance(public, jwk.PublicKey)
    key = ResidentKey(load_object("machine.tpm"))
    for _ in range(3):
        peer = jwk.private_key(ec.generate_private_key(ec.SECP256R1()))
        assert key.exchange(peer.public) == peer.exchange(public)
    with pytest.raises(ValueError, match="different kinds"):
        key.exchange(jwk.private_key(ec.generate_private_key(ec.SECP384R1())).public)


def test_no_private_half_in_the_file(place: Path) -> None:
    document = json.loads(Path("machine.tpm").read_text())
    assert document["kind"] == "key"
    assert opened() == b"secret"
    message = refused(KeyFileError, "encfs", "unseal", "machine.tpm")
    assert "never leaves the TPM" in message
    assert "never leaves the TPM" in refused(KeyFileError, "encfs", "seal", "tpm2:machine.tpm", "-o", "x", "--gramine")


def test_approvals(place: Path, tpm: SoftwareTpm) -> None:
    ok("imagetool", "keygen", "-o", "owner.jwk", "--type", "p256")
    words = ("--tpm2-pcrs", "sha256:7", "--tpm2-authorize", "owner.jwk.pub")
    ok("imagetool", "keygen", "-o", "other.tpm", "--tpm2", *words)
    tpm.extend(7)
    with pytest.raises(KeyRefusedError, match="differ"):
        opened("other.tpm", "other.tpm.pub")
    ok("encfs", "approve", "other.tpm", "--key", "owner.jwk", "--tpm2-pcrs", "sha256:7")
    assert opened("other.tpm", "other.tpm.pub") == b"secret"


def test_a_counter(place: Path) -> None:
    words = ("--tpm2-pcrs", "sha256:7", "--tpm2-nv-counter", "0x01800100")
    ok("imagetool", "keygen", "-o", "other.tpm", "--tpm2", *words)
    assert opened("other.tpm", "other.tpm.pub") == b"secret"
    ok("encfs", "advance", "0x01800100")
    with pytest.raises(KeyRefusedError, match="has moved beyond"):
        opened("other.tpm", "other.tpm.pub")


def test_other_recipients_do_not_open(place: Path) -> None:
    ok("imagetool", "keygen", "-o", "second.tpm", "--tpm2", "--tpm2-pcrs", "sha256:7")
    ok("imagetool", "keygen", "-o", "alice.jwk")
    with pytest.raises(WrongKeyError, match="opens none of the p256 recipients"):
        opened("machine.tpm", "second.tpm.pub")
    with pytest.raises(WrongKeyError, match="the keyring has none"):
        opened("machine.tpm", "alice.jwk.pub")


def test_another_tpm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in software_tpm():
        monkeypatch.setenv("TPM2TOOLS_TCTI", other.tcti)
        with pytest.raises(KeyRefusedError, match="not the TPM that the file was made with"):
            opened()


def test_a_changed_file(place: Path) -> None:
    genuine = json.loads(Path("machine.tpm").read_text())
    public = base64.b64decode(genuine["public"])

    def attempt(**members: object) -> None:
        Path("x.tpm").unlink(missing_ok=True)
        Path("x.tpm").write_text(json.dumps(genuine | members))
        Path("x.tpm").chmod(0o600)
        opened("x.tpm")

    lax = genuine["policy"] | {"pcrs": {"bank": "sha256", "values": {"7": "00" * 32}}}
    for members in (
        {"policy": lax},
        {"policy": None},
        {"kind": "sealed"},
        {"kind": "ak"},
        {"public": b64_encode(public[:-1])},
        {"public": b64_encode(public + b"\0")},
        {"public": b64_encode(public[:4] + bytes([public[4] ^ 1]) + public[5:])},
    ):
        with pytest.raises(KeyFileError):
            attempt(**members)
    private = base64.b64decode(genuine["private"])
    with pytest.raises(KeyProviderError):
        attempt(private=b64_encode(private[:-1] + bytes([private[-1] ^ 1])))


def test_a_kind_that_the_tpm_does_not_make(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This TPM makes RSA keys up to 3072 bits, and knows no curve of that number.
    monkeypatch.setattr(structures, "RESIDENT_MODULI", {"rsa2048": 2048, "rsa3072": 4096, "rsa1": 1}, raising=True)
    monkeypatch.setattr(structures, "RESIDENT_KINDS", ("p256", "rsa2048", "rsa3072", "rsa1"))
    keygen = ("imagetool", "keygen", "-o", "x", "--tpm2", "--tpm2-pcrs", "sha256:7")
    message = refused(KeyProviderError, *keygen, "--type", "rsa3072")
    assert message.endswith("this TPM makes no keys of type rsa3072; it makes p256, rsa2048")
    assert not Path("x").exists()


def test_what_cannot_be_asked_for(place: Path) -> None:
    keygen = ("imagetool", "keygen", "-o", "x")
    refused(UsageError, *keygen, "--tpm2")
    refused(UsageError, *keygen, "--tpm2", "--type", "oct", "--tpm2-pcrs", "sha256:7")
    refused(UsageError, *keygen, "--tpm2-pcrs", "sha256:7")
    assert "rsa2048 is for keys in a TPM" in refused(UsageError, *keygen, "--type", "rsa2048")
    assert not Path("x").exists()
    refused(ConflictError, "imagetool", "keygen", "-o", "machine.tpm", "--tpm2", "--tpm2-pcrs", "sha256:7")
    Path("x.pub").touch()
    refused(ConflictError, *keygen, "--tpm2", "--tpm2-pcrs", "sha256:7")
    assert not Path("x").exists(), "nothing half-made stays behind"
