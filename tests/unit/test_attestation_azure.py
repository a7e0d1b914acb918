"""Azure's vTPM evidence: genuine sets of every version verify, and each link of the chain is refused when it breaks."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.attestation import amd
from encfs.attestation.azure import parse_hcl_report
from encfs.attestation.evidence import Endorsements, EvidenceKind
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import recognise, verify_evidence
from encfs.encoding import b64url_encode, parse_b64_urlsafe
from encfs.errors import FormatError
from tests.support.snpchip import MEASUREMENT, SnpChip, trust_authority

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence" / "azure"
NOW = datetime(2025, 6, 20, tzinfo=UTC)
SNP = json.loads((FIXTURES / "snp-evidence-v1.json").read_text())
TDX = json.loads((FIXTURES / "tdx-evidence-v1.json").read_text())
REPORT = parse_b64_urlsafe(SNP["hcl_report"], "report")
MESSAGE = bytes.fromhex(SNP["tpm_quote"]["message"])
CHALLENGE = EvidencePolicy(report_data=b"challenge", allow_missing_collateral=True)
RUNTIME = range(1236, 1236 + int.from_bytes(REPORT[1232:1236], "little"))


def judge(document: dict[str, Any] | bytes, policy: EvidencePolicy = CHALLENGE) -> Verdict:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return verify_evidence(content, policy, now=NOW)


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def with_report(report: bytes) -> dict[str, Any]:
    return SNP | {"hcl_report": base64.urlsafe_b64encode(report).decode()}


def with_quote(**members: object) -> dict[str, Any]:
    return SNP | {"tpm_quote": SNP["tpm_quote"] | members}


@pytest.mark.parametrize("name", ["snp-evidence-v0", "snp-evidence-v1", "tdx-evidence-v1"])
def test_genuine_evidence_verifies(name: str) -> None:
    verdict = judge((FIXTURES / f"{name}.json").read_bytes())
    assert verdict.codes == ()
    assert verdict.claims["debug"] is False
    configuration = verdict.claims["vm_configuration"]
    assert isinstance(configuration, dict)
    assert configuration["secure-boot"] in (True, False)
    stale = EvidencePolicy(report_data=b"other", allow_missing_collateral=True)
    assert judge((FIXTURES / f"{name}.json").read_bytes(), stale).codes == ("report-data",)


@pytest.mark.parametrize("name", ["snp-evidence-genoa", "snp-evidence-v2"])
def test_genuine_evidence_of_other_challenges(name: str) -> None:
    verdict = judge((FIXTURES / f"{name}.json").read_bytes(), EvidencePolicy())
    assert verdict.codes == ()
    data = bytes.fromhex(str(verdict.claims["report_data"]))
    assert judge((FIXTURES / f"{name}.json").read_bytes(), EvidencePolicy(report_data=data)).codes == ()


def test_what_the_policy_asks_of_hardware_and_pcrs() -> None:
    claims = judge(SNP).claims
    pcrs = claims["pcrs"]
    assert isinstance(pcrs, dict)
    good = EvidencePolicy(
        measurements=(bytes.fromhex(str(claims["measurement"])),), pcrs={4: (bytes.fromhex(str(pcrs["4"])),)}
    )
    assert judge(SNP, good).codes == ()
    assert judge(SNP, EvidencePolicy(measurements=(bytes(48),), pcrs={4: (bytes(32),)})).codes == ("measurement", "pcr")
    assert judge(SNP, EvidencePolicy(kinds=frozenset({EvidenceKind.SNP}))).codes == ("kind",)
    # PCRs are the paravisor's word: without its measurement anybody's guest could vouch for anybody's key.
    assert judge(SNP, replace(good, measurements=())).codes == ("measurement",)
    # Without collateral nobody knows of a TDX platform's firmware.
    assert judge(TDX, EvidencePolicy()).codes == ("missing",)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([at for at in range(32, 32 + 1184) if not at >= 0x2A0 + 32 + 144]), st.integers(0, 7))
def test_every_byte_of_the_hardware_report_counts(at: int, bit: int) -> None:
    try:
        assert judge(with_report(flipped(REPORT, at, bit))).accepted is False
    except FormatError:
        return


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(RUNTIME), st.integers(0, 7))
def test_every_byte_of_the_runtime_data_counts(at: int, bit: int) -> None:
    try:
        verdict = judge(with_report(flipped(REPORT, at, bit)))
    except FormatError:
        return
    assert "binding" in verdict.codes


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(MESSAGE) - 1), st.integers(0, 7))
def test_every_byte_of_the_quote_counts(at: int, bit: int) -> None:
    try:
        verdict = judge(with_quote(message=flipped(MESSAGE, at, bit).hex()))
    except FormatError:
        return
    assert "signature" in verdict.codes


def test_parts_of_different_machines() -> None:
    other = json.loads((FIXTURES / "snp-evidence-v2.json").read_text())
    # Another boot's quote under this report, and another report above this quote.
    assert "signature" in judge(SNP | {"tpm_quote": other["tpm_quote"]}, EvidencePolicy()).codes
    assert "signature" in judge(SNP | {"hcl_report": other["hcl_report"], "vcek": other["vcek"]}).codes
    assert set(judge(TDX | {"tpm_quote": SNP["tpm_quote"]}).codes) >= {"signature"}
    pcrs = [*SNP["tpm_quote"]["pcrs"]]
    pcrs[4] = "00" * 32
    assert judge(with_quote(pcrs=pcrs)).codes == ("pcr",)


def test_a_bare_report_is_not_fresh() -> None:
    vcek = parse_b64_urlsafe(SNP["vcek"], "vcek")
    assert recognise(REPORT) is EvidenceKind.AZURE_SNP_VTPM
    with_chain = Endorsements((vcek,))
    verdict = verify_evidence(REPORT, EvidencePolicy(), endorsements=with_chain, now=NOW)
    assert verdict.codes == ()
    assert "missing" in {one.code.value for one in verdict.unchecked}
    assert verify_evidence(REPORT, CHALLENGE, endorsements=with_chain, now=NOW).codes == ("missing",)
    pcrs = EvidencePolicy(pcrs={4: (bytes(32),)})
    assert verify_evidence(REPORT, pcrs, endorsements=with_chain, now=NOW).codes == ("missing",)
    assert judge((FIXTURES / "tdx-hcl-report.bin").read_bytes(), EvidencePolicy()).codes == ("missing",)


@pytest.mark.parametrize("size", [4, 40, 1216, 1235, 1300])
def test_a_report_cut_short(size: int) -> None:
    with pytest.raises(FormatError):
        parse_hcl_report(REPORT[:size])


@pytest.mark.parametrize(
    "document",
    [
        SNP | {"version": 3},
        SNP | {"hcl_report": "!"},
        SNP | {"vcek": 5},
        SNP | {"tpm_quote": []},
        with_quote(pcrs=["00"]),
        with_quote(signature="XX"),
        SNP | {"td_quote": "AAAA"},
        TDX | {"hcl_report": SNP["hcl_report"]},
        {"quote": {}, "report": [1], "vcek": "x"},
        {"quote": {"message": [256], "pcrs": [], "signature": []}, "report": [1], "vcek": "x"},
    ],
)
def test_malformed_evidence(document: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        judge(document)


def forged(chip: SnpChip, **fields: Any) -> bytes:
    """Evidence of somebody with a chip: a report of his own about a TPM that he is himself, with PCRs as he likes."""
    key = rsa.generate_private_key(65537, 2048)
    numbers = key.public_key().public_numbers()
    jwk = {"kid": "HCLAkPub", "kty": "RSA", "n": b64url_encode(numbers.n.to_bytes(256)), "e": "AQAB"}
    runtime = json.dumps({"keys": [jwk]}).encode()
    report = chip.report(hashlib.sha256(runtime).digest(), **fields)
    header = struct.pack("<IIIII", 20 + len(runtime), 1, 2, 1, len(runtime))
    pcrs = [bytes(31) + bytes([index]) for index in range(24)]
    quoted = hashlib.sha256(b"".join(pcrs)).digest()
    message = bytes.fromhex("ff5443478018") + bytes(2) + bytes([0, 9]) + b"challenge" + bytes(17 + 8)
    message += bytes.fromhex("00000001000b03ffffff0020") + quoted
    quote = {
        "message": message.hex(),
        "signature": key.sign(message, padding.PKCS1v15(), SHA256()).hex(),
        "pcrs": [value.hex() for value in pcrs],
    }
    hcl = b"HCLA" + bytes(28) + report + header + runtime
    document = {"version": 1, "tpm_quote": quote, "hcl_report": encoded(hcl), "vcek": encoded(chip.vcek)}
    return json.dumps(document).encode()


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def test_who_has_the_hardware_does_not_have_the_paravisor(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = SnpChip()
    monkeypatch.setattr(amd, "_issuers", amd._issuers)
    trust_authority(chip.authority)
    amd._endorsement_key.cache_clear()
    wanted = replace(CHALLENGE, pcrs={7: (bytes(31) + b"\7",)})
    now = datetime.now(UTC)

    def codes(policy: EvidencePolicy, **fields: Any) -> tuple[str, ...]:
        return verify_evidence(forged(chip, **fields), policy, now=now).codes

    # Nothing is wrong with it but whose it is.
    assert codes(replace(wanted, measurements=(MEASUREMENT,))) == ()
    assert codes(wanted) == ("measurement",)
    assert codes(replace(wanted, measurements=(MEASUREMENT,)), measurement=bytes(48)) == ("measurement",)
    # What runs above the paravisor asked for it.
    assert codes(replace(wanted, measurements=(MEASUREMENT,), max_vmpl=3), vmpl=2) == ("vmpl",)
    amd._endorsement_key.cache_clear()
