"""The providers snp: and gramine:, through a firmware behind the ioctl and a directory in the place of Gramine's."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from encfs.attestation.collect.sev_guest import device_problem
from encfs.errors import KeyFileError, KeyProviderError, WrongKeyError
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import availabilities, gramine, known_schemes, snp
from encfs.keys.providers.cdh import CdhProvider
from encfs.keys.providers.gramine import GramineProvider
from encfs.keys.secrets import SymmetricKey
from tests.support.keys import DIGEST
from tests.support.sev_guest import Firmware


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "sev-guest"
    path.touch()
    return path


def kek(firmware: Firmware, device: Path, text: str = "") -> bytes:
    return bytes(snp.derived_kek(snp.parse_options(text), device=device, ioctl=firmware.ioctl))


def test_policy_and_measurement_are_always_mixed_in(device: Path) -> None:
    plain = kek(Firmware(), device)
    assert plain == kek(Firmware(), device)
    assert plain != kek(Firmware(policy=0x30000 | 1 << 19), device)
    assert plain != kek(Firmware(measurement=b"\1" * 48), device)


@pytest.mark.parametrize(
    ("text", "fields", "others"),
    [
        ("", 0b001001, {"root_key": 0, "vmpl": 0, "guest_svn": 0, "tcb_version": 0}),
        ("image-id,family-id", 0b001111, {}),
        ("svn=3", 0b011001, {"guest_svn": 3}),
        ("svn=0", 0b011001, {"guest_svn": 0}),
        ("tcb=0300000000000873", 0b101001, {"tcb_version": 0x7308000000000003}),
        ("vmpl=2,root=vmrk", 0b001001, {"vmpl": 2, "root_key": 1}),
    ],
)
def test_options_reach_the_firmware(device: Path, text: str, fields: int, others: dict[str, int]) -> None:
    firmware = Firmware()
    kek(firmware, device, text)
    (asked,) = firmware.requests
    assert asked["fields"] == fields
    assert others.items() <= asked.items()


@pytest.mark.parametrize(
    "text",
    [
        "policy",
        "svn",
        "svn=",
        "svn=-1",
        "svn=4294967296",
        "svn=1,svn=2",
        "tcb=12",
        "vmpl=4",
        "root=x",
        "image-id=1",
        ",",
    ],
)
def test_malformed_options_are_refused(text: str) -> None:
    with pytest.raises(KeyFileError):
        snp.SnpProvider(text)


def test_no_device_and_refusals_of_the_firmware(device: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError, match="cannot be opened"):
        snp.derived_kek(device=tmp_path / "missing")
    with pytest.raises(KeyProviderError, match="status 0x16"):
        kek(Firmware(), device, "svn=9")
    with pytest.raises(KeyProviderError, match="firmware 0x5"):
        kek(Firmware(error=5), device)


def test_an_artifact_opens_with_the_guests_key_only(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, other = Firmware(), Firmware(measurement=b"\2" * 48)
    recipient = SymmetricKey(bytearray(kek(mine, device)))
    keyring = parse_keyring(create_keyring(b"payload", DIGEST, [recipient]), DIGEST)
    real = snp.derive_key
    provider = snp.SnpProvider("")
    monkeypatch.setattr(snp, "derive_key", lambda **given: real(**given | {"device": device, "ioctl": mine.ioctl}))
    assert len(provider.unwrap(keyring.recipients, DIGEST)) == 32
    monkeypatch.setattr(snp, "derive_key", lambda **given: real(**given | {"device": device, "ioctl": other.ioctl}))
    with pytest.raises(WrongKeyError):
        provider.unwrap(keyring.recipients, DIGEST)


def test_gramine_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "_sgx_mrenclave").write_bytes(b"e" * 16)
    (keys / "_sgx_mrsigner").write_bytes(b"e" * 16)
    mine = gramine.derived_kek(root=tmp_path)
    assert len(mine) == 32
    assert mine != gramine.derived_kek("_sgx_mrsigner", root=tmp_path)  # the name is part of the derivation

    recipient = SymmetricKey(mine)
    keyring = parse_keyring(create_keyring(b"payload", DIGEST, [recipient]), DIGEST)
    real = gramine.derived_kek
    monkeypatch.setattr(gramine, "derived_kek", lambda name: real(name, root=tmp_path))
    assert len(gramine.GramineProvider("").unwrap(keyring.recipients, DIGEST)) == 32
    with pytest.raises(WrongKeyError):
        gramine.GramineProvider("_sgx_mrsigner").unwrap(keyring.recipients, DIGEST)


@pytest.mark.parametrize("content", [b"", b"e" * 15, b"e" * 17, bytes(16)])
def test_gramine_keys_that_were_not_set_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "default").write_bytes(content)
    with pytest.raises(KeyProviderError, match="not set"):
        gramine.derived_kek("default", root=tmp_path)


def test_gramine_names_stay_in_their_directory(tmp_path: Path) -> None:
    for name in ("../secret", "a/b", ".", "a" * 65):
        with pytest.raises(KeyFileError):
            gramine.GramineProvider(name)
    with pytest.raises(KeyProviderError, match="cannot be read"):
        gramine.derived_kek("absent", root=tmp_path)


def test_what_this_machine_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", "device:/dev/no-such-tpm")
    found = {one.scheme: one for one in availabilities()}
    assert set(found) == set(known_schemes()) >= {"file", "env", "passphrase", "kbs", "cdh", "snp", "gramine", "tpm2"}
    assert all(found[scheme].usable for scheme in ("file", "env", "passphrase"))
    assert found["tpm2"].reason == "/dev/no-such-tpm does not exist"
    monkeypatch.setattr("encfs.keys.providers.gramine.ROOT", tmp_path)
    assert "no SGX enclave under Gramine" in str(GramineProvider.unavailable())
    (tmp_path / "keys").mkdir()
    assert GramineProvider.unavailable() is None
    device = tmp_path / "sev-guest"
    assert "is no SEV-SNP guest" in str(device_problem(device))
    device.touch()
    assert device_problem(device) is None


def test_whether_a_hub_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("encfs.cdh.PORT", server.getsockname()[1])
        assert CdhProvider.unavailable() is None
    assert "Connection refused" in str(CdhProvider.unavailable())


def test_a_provider_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "odd-1.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (directory / "entry_points.txt").write_text("[encfs.key_providers]\nodd = no_such_module:Provider\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {one.scheme: one for one in availabilities()}
    assert not found["odd"].usable
    assert "cannot be loaded" in str(found["odd"].reason)
