"""Quotes of a real TPM (swtpm), judged by tpm2-tools; Azure's places in a TPM, filled with Azure's own bytes."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_der_public_key,
    load_pem_public_key,
)

from encfs.attestation.kbs import from_kbs_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verify import verify_evidence
from encfs.errors import ConflictError, KeyFileError, KeyProviderError, KeyRefusedError
from encfs.tpm.keyfile import load_object, write_object
from encfs.tpm.quote import (
    attestation_public_key,
    collect_azure_evidence,
    collect_tpm_evidence,
    create_attestation_key,
)
from tests.integration.test_tpm_sealing import ok, refused
from tests.support.documented import assert_as_documented
from tests.support.tpm import SoftwareTpm, software_tpm, tpm

__all__ = ["tpm"]

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
REPORT_DATA = bytes(range(48))


@pytest.fixture
def ak(tpm: SoftwareTpm, tmp_path: Path) -> Path:
    path = tmp_path / "ak.tpm"
    write_object(create_attestation_key(), path)
    return path


def judged(tpm: SoftwareTpm, tmp_path: Path, evidence: dict[str, object], qualification: bytes) -> bool:
    """What tpm2_checkquote says."""
    quote = evidence["tpm_quote"]
    assert isinstance(quote, dict)
    key = load_der_public_key(base64.b64decode(str(evidence["ak_public"])))
    (tmp_path / "ak.pem").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (tmp_path / "message").write_bytes(base64.b64decode(quote["message"]))
    (tmp_path / "signature").write_bytes(base64.b64decode(quote["signature"]))
    words = ["-u", "ak.pem", "-m", "message", "-s", "signature", "-q", qualification.hex(), "-g", "sha256"]
    paths = [str(tmp_path / word) if word in ("ak.pem", "message", "signature") else word for word in words]
    return tpm.tool("checkquote", *paths, check=False).returncode == 0


def test_a_quote_verifies(tpm: SoftwareTpm, ak: Path, tmp_path: Path) -> None:
    tpm.extend(8)
    evidence = collect_tpm_evidence(REPORT_DATA, ak)
    assert judged(tpm, tmp_path, evidence, REPORT_DATA[:32])
    assert not judged(tpm, tmp_path, evidence, REPORT_DATA[1:33])
    # The same members and types as evidence that others collected.
    other = json.loads((FIXTURES / "tpm" / "evidence.json").read_text())
    assert set(evidence) == set(other)
    assert set(evidence["tpm_quote"]) == set(other["tpm_quote"])  # type: ignore[call-overload]
    pcrs = evidence["tpm_quote"]["pcrs"]  # type: ignore[index]
    shown = tpm.tool("pcrread", "sha256:8").stdout.decode().split("0x")[1].strip().lower()
    assert pcrs[8] == shown
    assert len(pcrs) == 24
    assert tpm.transient() == ""


def test_some_pcrs_only(tpm: SoftwareTpm, ak: Path, tmp_path: Path) -> None:
    evidence = collect_tpm_evidence(b"short", ak, pcrs=[11, 7])
    assert judged(tpm, tmp_path, evidence, b"short".ljust(32, b"\0"))


def test_the_public_key_is_that_of_the_file(tpm: SoftwareTpm, ak: Path) -> None:
    shown = attestation_public_key(load_object(ak))
    assert base64.b64decode(str(collect_tpm_evidence(REPORT_DATA, ak)["ak_public"])) == shown
    tpm.restart()
    assert base64.b64decode(str(collect_tpm_evidence(REPORT_DATA, ak)["ak_public"])) == shown


def test_an_altered_public_key_is_refused(ak: Path) -> None:
    members = json.loads(ak.read_text())
    public = bytearray(base64.b64decode(members["public"]))
    public[-1] ^= 2
    ak.write_text(json.dumps(members | {"public": base64.b64encode(public).decode()}))
    with pytest.raises(KeyProviderError, match="the file was altered"):
        collect_tpm_evidence(REPORT_DATA, ak)


def test_another_tpm_does_not_quote_with_it(ak: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in software_tpm():
        monkeypatch.setenv("TPM2TOOLS_TCTI", other.tcti)
        with pytest.raises(KeyRefusedError, match="not the TPM that the file was made with"):
            collect_tpm_evidence(REPORT_DATA, ak)


def persistent_ak(tpm: SoftwareTpm, handle: str, kind: str = "rsa", scheme: str = "rsassa") -> None:
    tpm.tool("createek", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
    tpm.tool("createak", "-C", "ek.ctx", "-c", "ak.ctx", "-G", kind, "-g", "sha256", "-s", scheme)
    tpm.tool("evictcontrol", "-c", "ak.ctx", handle)


def test_a_persistent_key_quotes_too(tpm: SoftwareTpm, tmp_path: Path) -> None:
    persistent_ak(tpm, "0x81000005")
    assert judged(tpm, tmp_path, collect_tpm_evidence(REPORT_DATA, 0x81000005), REPORT_DATA[:32])
    with pytest.raises(KeyProviderError, match="no attestation key is at 0x81000006"):
        collect_tpm_evidence(REPORT_DATA, 0x81000006)


def refusals(evidence: dict[str, object], policy: EvidencePolicy) -> tuple[str, ...]:
    """What our own verifier says."""
    return verify_evidence(from_kbs_evidence("tpm", evidence), policy, now=datetime.now(UTC)).codes


def test_our_verifier_agrees(tpm: SoftwareTpm, ak: Path) -> None:
    enrolled = (attestation_public_key(load_object(ak)),)
    tpm.extend(8)
    evidence = collect_tpm_evidence(REPORT_DATA, ak)
    value = bytes.fromhex(evidence["tpm_quote"]["pcrs"][8])  # type: ignore[index]
    policy = EvidencePolicy(attestation_keys=enrolled, report_data=REPORT_DATA, pcrs={7: (bytes(32),), 8: (value,)})
    assert refusals(evidence, policy) == ()
    assert refusals(evidence, replace(policy, report_data=REPORT_DATA[1:])) == ("report-data",)
    assert refusals(evidence, replace(policy, attestation_keys=(enrolled[0][:-1],))) == ("attestation-key",)
    assert refusals(collect_tpm_evidence(REPORT_DATA, ak, pcrs=[7]), policy) == ("pcr",)
    tpm.extend(8)
    assert refusals(collect_tpm_evidence(REPORT_DATA, ak), policy) == ("pcr",)


def test_our_verifier_agrees_on_a_key_on_a_curve(tpm: SoftwareTpm) -> None:
    persistent_ak(tpm, "0x81000005", "ecc", "ecdsa")
    evidence = collect_tpm_evidence(REPORT_DATA, 0x81000005)
    enrolled = (base64.b64decode(str(evidence["ak_public"])),)
    assert refusals(evidence, EvidencePolicy(attestation_keys=enrolled, report_data=REPORT_DATA)) == ()


def test_azure(tpm: SoftwareTpm, tmp_path: Path) -> None:
    with pytest.raises(KeyProviderError, match="does not hold the report of an Azure"):
        collect_azure_evidence(REPORT_DATA)
    # As much of a real one as fits into an index of swtpm; more than a TPM returns at once.
    report = tmp_path / "report"
    report.write_bytes((FIXTURES / "azure" / "snp-hcl-report.bin").read_bytes()[:2048])
    tpm.tool("nvdefine", "0x01400001", "-C", "o", "-s", "2048", "-a", "ownerread|ownerwrite")
    tpm.tool("nvwrite", "0x01400001", "-C", "o", "-i", str(report))
    persistent_ak(tpm, "0x81000003")
    found, quote = collect_azure_evidence(REPORT_DATA)
    assert found == report.read_bytes()
    # All of the report data, as attesters on Azure do it.
    assert judged(tpm, tmp_path, quote.evidence(), REPORT_DATA)


def test_a_locked_out_tpm_says_so(tpm: SoftwareTpm, tmp_path: Path) -> None:
    tpm.tool("createprimary", "-C", "o", "-c", "p.ctx")
    tpm.tool(
        *("create", "-C", "p.ctx", "-u", "k.pub", "-r", "k.priv", "-G", "rsa2048:rsassa-sha256:null", "-p", "secret"),
        *("-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"),
    )
    tpm.tool("load", "-C", "p.ctx", "-u", "k.pub", "-r", "k.priv", "-c", "k.ctx")
    tpm.tool("evictcontrol", "-c", "k.ctx", "0x81000007")
    tpm.tool("dictionarylockout", "--setup-parameters", "--max-tries=1", "--recovery-time=1000")
    with pytest.raises(KeyProviderError, match="a password is set"):
        collect_tpm_evidence(REPORT_DATA, 0x81000007)
    with pytest.raises(KeyProviderError, match="locked out") as caught:
        collect_tpm_evidence(REPORT_DATA, 0x81000007)
    assert caught.value.hint is not None
    assert "--clear-lockout" in caught.value.hint
    assert tpm.transient() == ""


def test_no_tpm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TPM2TOOLS_TCTI", raising=False)
    monkeypatch.setenv("TSS2_TCTI", f"device:{tmp_path}/none")
    with pytest.raises(KeyProviderError, match=r"there is no TPM to use: .*/none does not exist"):
        create_attestation_key()
    monkeypatch.setenv("TPM2TOOLS_TCTI", f"swtpm:path={tmp_path}/none")
    with pytest.raises(KeyProviderError, match="does not answer"):
        create_attestation_key()
    monkeypatch.setenv("TPM2TOOLS_TCTI", "nonsense")
    with pytest.raises(KeyProviderError, match="does not answer"):
        create_attestation_key()


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"format": "x"}')
    with pytest.raises(KeyFileError, match="no TPM key file"):
        collect_tpm_evidence(REPORT_DATA, tmp_path / "x")


def test_enrolling_by_command(tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = json.loads(ok("encfs", "attest", "enrol", "-o", "ak.tpm", "--json"))
    assert_as_documented("encfs attest enrol", made)
    public = load_pem_public_key((tmp_path / "ak.tpm.pub").read_bytes())
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert made["fingerprint"] == hashlib.sha256(der).hexdigest()
    evidence = collect_tpm_evidence(REPORT_DATA, tmp_path / "ak.tpm")
    assert base64.b64decode(str(evidence["ak_public"])) == der
    assert judged(tpm, tmp_path, evidence, REPORT_DATA[:32])
    assert "ak.tpm exists" in refused(ConflictError, "encfs", "attest", "enrol", "-o", "ak.tpm")
    Path("ak.tpm").rename("other.tpm")
    assert "ak.tpm.pub exists" in refused(ConflictError, "encfs", "attest", "enrol", "-o", "ak.tpm")
    assert not Path("ak.tpm").exists()
    monkeypatch.setenv("TPM2TOOLS_TCTI", "device:/dev/no-such-tpm")
    assert "there is no TPM to use" in refused(KeyProviderError, "encfs", "attest", "enrol", "-o", "third.tpm")
    assert not Path("third.tpm").exists()
    assert "holds no sealed key" in refused(KeyFileError, "encfs", "unseal", "other.tpm")
