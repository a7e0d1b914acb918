"""`skr:` with `direct=yes` in a confidential VM of Azure's: a real TPM, and services that check what they get."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from encfs.attestation.collect.sources import Machine
from encfs.errors import AttestationError, KeyProviderError, KeyRefusedError
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers.skr import SkrProvider
from encfs.keys.secrets import SymmetricKey
from encfs.webclient import Address
from tests.support.azure import decode, encode, serving
from tests.support.azure_guest import SNP, TDX, GuestAzure, make_machine
from tests.support.eventlogs import Log, image
from tests.support.kbs_server import make_certificate
from tests.support.tpm import SoftwareTpm, software_tpm, tpm

__all__ = ["tpm"]

DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))


@dataclass(frozen=True)
class Place:
    azure: GuestAzure
    tpm: SoftwareTpm
    machine: Machine
    pcrs: bytes
    uri: str

    def opened(self, machine: Machine | None = None) -> bytes:
        provider = SkrProvider(self.uri, machine=machine or self.machine)
        keyring = create_keyring(b"secret", DIGEST, [SymmetricKey(bytearray(KEK))])
        return bytes(parse_keyring(keyring, DIGEST).open([provider]))


def prepared(tpm: SoftwareTpm, tmp_path: Path, kind: int = SNP) -> Iterator[Place]:
    log = Log()
    log.add(0, 0x00000008, b"2.7")
    log.add(4, 0x80000003, image("\\EFI\\linux.efi"), measured=b"kernel")
    make_machine(tpm, log, tmp_path, kind)
    (tmp_path / "binary_bios_measurements").write_bytes(log.content)
    (tmp_path / "chassis").write_text("7783-7084-3265-9085-8269-3286-77\n")
    shown = tpm.tool("pcrread", "sha256:0,1,2,3,4,5,6,7").stdout.decode().split("0x")[1:]
    values = b"".join(bytes.fromhex(one.split()[0]) for one in shown)
    azure = GuestAzure({"chat": ("oct", KEK)}, host_data=hashlib.sha256(values).digest())
    certificate = make_certificate(tmp_path)
    with serving(azure, certificate) as secure, serving(azure, None) as plain:
        machine = Machine(
            *(tmp_path / name for name in ("tsm", "sev-guest", "gramine", "occlum", "chassis")),
            tpm_logs=tmp_path,
            metadata_service=Address("http", "127.0.0.1", plain, ""),
        )
        ends = f"akv=127.0.0.1:{secure}&maa=127.0.0.1:{secure}"
        yield Place(azure, tpm, machine, azure.host_data, f"chat?{ends}&direct=yes&ca={certificate[0]}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A machine whose PCRs no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        for one in software_tpm():
            patch.setenv("TPM2TOOLS_TCTI", one.tcti)
            patch.delenv("UVM_SECURITY_CONTEXT_DIR", raising=False)
            yield from prepared(one, tmp_path_factory.mktemp("machine"))


@pytest.fixture
def place(shared: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same, with services that have not been asked anything, and do nothing wrong."""
    monkeypatch.setenv("TPM2TOOLS_TCTI", shared.tpm.tcti)
    azure = shared.azure
    azure.asked.clear()
    azure.infos.clear()
    azure.faults.clear()
    azure.wrapping, azure.host_data = "RSA_AES_KEY_WRAP_256", shared.pcrs
    return shared


def test_a_key_is_released_to_a_machine(place: Place) -> None:
    assert place.opened() == b"secret"
    assert place.azure.asked == [
        "/metadata/identity/oauth2/token",
        "/metadata/THIM/amd/certification",
        "/attest/AzureGuest",
        "/keys/chat/release",
    ]
    # As vaults do it by default, with SHA-1 in the padding; and the key was another one.
    place.azure.wrapping = "CKM_RSA_AES_KEY_WRAP"
    assert place.opened() == b"secret"
    one, two = (info["TpmInfo"]["EncKeyPub"] for info in place.azure.infos)
    assert one != two
    assert place.tpm.transient() == ""


def test_a_release_policy_that_is_not_met(place: Place) -> None:
    place.azure.host_data = bytes(32)
    with pytest.raises(KeyRefusedError, match="Azure Key Vault refuses with status 403: the release policy is not met"):
        place.opened()


def test_a_machine_whose_pcrs_change(tpm: SoftwareTpm, tmp_path: Path) -> None:
    for place in prepared(tpm, tmp_path):

        def extended(
            status: int, document: dict[str, Any], measured: SoftwareTpm = place.tpm
        ) -> tuple[int, dict[str, Any]]:
            # Without the tool's cleaning up, which would end the sessions of others.
            environment = os.environ | {"TPM2TOOLS_TCTI": measured.tcti}
            subprocess.run(["tpm2_pcrextend", f"4:sha256={'11' * 32}"], env=environment, check=True, timeout=60)
            return status, document

        # Between the attestation and the release: the key is there, and the TPM does not use it any more.
        place.azure.faults["/keys/chat/release"] = extended
        with pytest.raises(KeyRefusedError, match=r"PCR 4 \(sha256\) differ"):
            place.opened()
        # Before: the log does not explain them.
        place.azure.faults.clear()
        with pytest.raises(KeyRefusedError, match=r"Microsoft Azure Attestation refuses with status 400: .*event log"):
            place.opened()
        assert place.tpm.transient() == ""


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _envelope(**members: object) -> dict[str, Any]:
    texts: dict[str, object] = {
        "EncryptedInnerKey": encoded(bytes(256)),
        "EncryptionParams": {"Iv": encoded(bytes(12))},
        "AuthenticationData": encoded(bytes(16)),
        "Jwt": encoded(b"token"),
    }
    return {"token": encode(json.dumps(texts | members).encode())}


def test_malformed_tokens(place: Place) -> None:
    for answer, message in (
        ({}, "answers without token"),
        ({"token": "e30.e30.e30"}, "that is no token: "),
        ({"token": encode(b"[]")}, "that is no token: "),
        ({"token": encode(b"{}")}, "it has no EncryptionParams"),
        (_envelope(EncryptedInnerKey=5), "no token: EncryptedInnerKey"),
        (_envelope(EncryptedInnerKey=""), "does not open with the key that was attested"),
        (_envelope(EncryptionParams={"Iv": ""}), "does not open with the key that was attested"),
        (_envelope(), "does not open with the key that was attested"),
    ):
        place.azure.faults["/attest/AzureGuest"] = lambda *_, answer=answer: (200, answer)
        with pytest.raises(KeyProviderError, match=message):
            place.opened()
    # A genuine one, altered.
    for member in ("Jwt", "AuthenticationData"):

        def altered(status: int, document: dict[str, Any], member: str = member) -> tuple[int, dict[str, Any]]:
            envelope = json.loads(decode(document["token"]))
            content = bytearray(base64.b64decode(envelope[member]))
            content[0] ^= 1
            return status, {"token": encode(json.dumps(envelope | {member: encoded(bytes(content))}).encode())}

        place.azure.faults["/attest/AzureGuest"] = altered
        with pytest.raises(KeyProviderError, match="does not open with the key that was attested"):
            place.opened()
    assert "/keys/chat/release" not in place.azure.asked


def test_parts_that_are_missing(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttestationError, match=r"the event log .* cannot be read"):
        place.opened(replace(place.machine, tpm_logs=tmp_path / "none"))
    with pytest.raises(KeyProviderError, match="no confidential container of Azure's"):
        place.opened(replace(place.machine, chassis=tmp_path / "none"))
    for other in software_tpm():
        monkeypatch.setenv("TPM2TOOLS_TCTI", other.tcti)
        with pytest.raises(KeyProviderError, match="does not hold the report of an Azure"):
            place.opened()
    assert "/attest/AzureGuest" not in place.azure.asked


def test_a_machine_with_tdx(tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UVM_SECURITY_CONTEXT_DIR", raising=False)
    for place in prepared(tpm, tmp_path, TDX):
        assert place.opened() == b"secret"
        assert place.azure.infos[0]["IsolationInfo"]["Type"] == "Tdx"
        assert "/acc/tdquote" in place.azure.asked
