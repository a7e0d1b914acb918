"""`encfs seal --snp` and `--gramine`: what the same guest or enclave opens, and what no other does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from encfs.attestation.collect.sources import THIS_MACHINE, Machine
from encfs.errors import AttestationError, KeyFileError, KeyProviderError, KeyRefusedError, UsageError
from encfs.keys.sealedfile import load_sealed, seal_under, unseal_under
from encfs.keys.secrets import SymmetricKey
from tests.integration.test_tpm_sealing import ok, refused
from tests.support.sev_guest import Firmware

KEK = bytes(range(32))


@pytest.fixture
def firmware() -> Firmware:
    return Firmware(measurement=b"\x11" * 48)


@pytest.fixture
def place(tmp_path: Path, firmware: Firmware, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with `kek.jwk`, on a machine with an SNP device and Gramine's files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sev-guest").touch()
    (tmp_path / "gramine" / "keys").mkdir(parents=True)
    (tmp_path / "gramine" / "keys" / "_sgx_mrenclave").write_bytes(b"e" * 16)
    (tmp_path / "gramine" / "keys" / "_sgx_mrsigner").write_bytes(b"s" * 16)
    machine = Machine(sev_guest=tmp_path / "sev-guest", gramine=tmp_path / "gramine", ioctl=firmware.ioctl)
    monkeypatch.setattr("encfs.keys.sealedfile.THIS_MACHINE", machine)
    ok("imagetool", "keygen", "-o", "kek.jwk", "--type", "oct")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "under"),
    [
        (("--snp",), "snp:"),
        (("--snp", "--derivation", "svn=3,vmpl=1"), "snp:svn=3,vmpl=1"),
        (("--gramine",), "gramine:"),
        (("--gramine", "--derivation", "_sgx_mrsigner"), "gramine:_sgx_mrsigner"),
    ],
)
def test_sealed_and_opened(place: Path, options: tuple[str, ...], under: str) -> None:
    made = json.loads(ok("encfs", "seal", "kek.jwk", "-o", "kek.sealed", *options, "--json"))
    key = json.loads((place / "kek.jwk").read_text())
    assert made["policy"] == {"under": under}
    assert made["kid"] == key["kid"]
    assert key["k"] not in (place / "kek.sealed").read_text()
    assert json.loads(ok("encfs", "unseal", "kek.sealed")) == key
    # As a key URI.
    (place / "data").mkdir()
    (place / "data" / "file").write_bytes(b"content")
    ok("imagetool", "encrypt", "data", "oci:a:t", "-r", "kek.jwk")
    pin = json.loads(ok("imagetool", "inspect", "oci:a:t", "--json"))["content_digest"]
    assert ok("encfs", "cat", "oci:a:t", "file", "-k", "sealed:kek.sealed", "--pin", pin) == "content"


def test_another_guest_or_enclave(place: Path, firmware: Firmware) -> None:
    ok("encfs", "seal", "kek.jwk", "-o", "a.sealed", "--snp")
    ok("encfs", "seal", "kek.jwk", "-o", "b.sealed", "--gramine")
    firmware.measurement = b"\x22" * 48
    message = refused(KeyRefusedError, "encfs", "unseal", "a.sealed")
    assert "a.sealed: the key of this machine (snp:) is not the one that it was sealed under" in message
    firmware.measurement = b"\x11" * 48
    firmware.policy ^= 1 << 19  # a debug guest
    refused(KeyRefusedError, "encfs", "unseal", "a.sealed")
    (place / "gramine" / "keys" / "_sgx_mrenclave").write_bytes(b"x" * 16)
    refused(KeyRefusedError, "encfs", "unseal", "b.sealed")
    (place / "sev-guest").unlink()
    assert "cannot be opened" in refused(KeyProviderError, "encfs", "unseal", "a.sealed")


def test_a_file_that_was_altered(place: Path) -> None:
    ok("encfs", "seal", "kek.jwk", "-o", "kek.sealed", "--gramine")
    document = json.loads((place / "kek.sealed").read_text())

    def attempt(**members: object) -> str:
        (place / "x.sealed").unlink(missing_ok=True)
        (place / "x.sealed").write_text(json.dumps(document | members))
        (place / "x.sealed").chmod(0o600)
        return str(members)

    for members in (
        {"under": "gramine:_sgx_mrsigner"},
        {"under": "snp:"},
        {"kid": "another"},
        {"kid": None},
        {"iv": "A" * 16},
        {"sealed": "A" * 64},
    ):
        attempt(**members)
        refused(KeyRefusedError, "encfs", "unseal", "x.sealed")
    for members in (
        {"under": "passphrase:command=true"},
        {"under": 5},
        {"kid": 5},
        {"iv": "AA"},
        {"sealed": ""},
        {"sealed": "!"},
        {"more": 1},
    ):
        attempt(**members)
        refused(KeyFileError, "encfs", "unseal", "x.sealed")
    # A file of the TPM's is none of these, and the other way round.
    (place / "kek.jwk").chmod(0o600)
    with pytest.raises(KeyFileError, match="is no sealed key"):
        load_sealed(place / "kek.jwk")


def test_what_cannot_be_asked_for(place: Path) -> None:
    seal = ("encfs", "seal", "kek.jwk", "-o", "x")
    refused(UsageError, *seal, "--snp", "--gramine")
    refused(UsageError, *seal, "--snp", "--tpm2-pcrs", "sha256:7")
    refused(UsageError, *seal, "--derivation", "svn=1", "--tpm2-pcrs", "sha256:7")
    refused(KeyFileError, *seal, "--snp", "--derivation", "speed=1")
    refused(KeyFileError, *seal, "--gramine", "--derivation", "../../etc/passwd")
    refused(KeyProviderError, *seal, "--gramine", "--derivation", "absent")
    assert not (place / "x").exists()


def test_here_there_is_neither(tmp_path: Path) -> None:
    nowhere = replace(THIS_MACHINE, sev_guest=tmp_path / "none", gramine=tmp_path)
    for under in ("snp:", "gramine:"):
        with pytest.raises((KeyProviderError, AttestationError)):
            seal_under(SymmetricKey(bytearray(KEK)), under, machine=nowhere)


def test_derived_keys_are_not_those_that_open_keyrings(place: Path) -> None:
    sealed = seal_under(SymmetricKey(bytearray(KEK), "k"), "gramine:")
    assert bytes(unseal_under(sealed).secret) == KEK
    assert sealed.sealed[:32] != KEK
