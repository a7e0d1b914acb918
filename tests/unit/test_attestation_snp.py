"""SNP reports: every genuine one verifies, and every other one is refused for the right reason."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.attestation import amd
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.kbs import digest_of_json, from_kbs_evidence, to_kbs_evidence
from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import recognise, verify_evidence
from encfs.errors import FormatError

EVIDENCE = Path(__file__).parents[2] / "fixtures" / "evidence"
NOW = datetime(2025, 6, 20, tzinfo=UTC)


def snp(name: str) -> bytes:
    return (EVIDENCE / "snp" / name).read_bytes()


REPORT, VCEK = snp("report-vcek.bin"), snp("vcek.der")
VLEK_REPORT, VLEK = snp("report-vlek.bin"), snp("vlek.der")


def judge(
    report: bytes = REPORT, *certificates: bytes, policy: EvidencePolicy | None = None, now: datetime = NOW
) -> Verdict:
    return verify_evidence(report, policy or EvidencePolicy(), endorsements=Endorsements(certificates), now=now)


def test_a_genuine_report_signed_by_a_chip_verifies() -> None:
    verdict = judge(REPORT, VCEK)
    assert verdict.accepted
    assert verdict.kind == "snp"
    assert verdict.claims["product"] == "Milan"
    assert verdict.claims["tcb"] == {"bootloader": 3, "tee": 0, "snp": 8, "microcode": 0x73}
    assert verdict.claims["debug"] is False
    assert {reason.code for reason in verdict.unchecked} == {"measurement", "tcb", "report-data", "revoked"}


def test_a_genuine_report_signed_by_a_providers_key_verifies() -> None:
    verdict = judge(VLEK_REPORT, VLEK, policy=EvidencePolicy(max_vmpl=1))
    assert verdict.accepted
    assert verdict.claims["signing_key"] == "VLEK"
    assert str(verdict.claims["provider"]).startswith("CN=cc-us-east-2")


@pytest.mark.parametrize("name", ["vcek-invalid-legacy.der", "vcek-invalid-new.der"])
def test_a_self_made_certificate_is_refused(name: str) -> None:
    assert judge(REPORT, snp(name)).codes == ("chain",)


def test_a_certificate_is_needed() -> None:
    assert judge(REPORT).codes == ("missing",)
    assert judge(REPORT, VLEK).codes == ("missing",)


def test_both_forms_of_the_protocol_say_the_same() -> None:
    for report, certificate in ((REPORT, VCEK), (VLEK_REPORT, VLEK)):
        evidence = Evidence(EvidenceKind.SNP, report, Endorsements((certificate,)))
        again = from_kbs_evidence("snp", to_kbs_evidence(evidence))
        assert again == evidence


def test_the_binding_of_runtime_data_has_the_known_value() -> None:
    digest = digest_of_json({"b": 1, "a": "test", "c": {"d": "e"}})
    assert digest.hex().startswith("e71ce8e7")
    assert digest.hex().endswith("78870c3")


def test_the_clock_is_looked_at() -> None:
    assert judge(REPORT, VCEK, now=NOW + timedelta(days=3650)).codes == ("expired",)
    assert judge(REPORT, VCEK, now=NOW - timedelta(days=3650)).codes == ("expired",)


def test_what_a_policy_asks_must_hold() -> None:
    measurement = REPORT[0x90:0xC0]
    good = EvidencePolicy(
        measurements=(bytes(48), measurement),
        report_data=REPORT[0x50:0x70],
        host_data=(bytes(32),),
        tcb_floors=(SnpTcbFloor("Milan", bootloader=3, snp=8, microcode=0x73), SnpTcbFloor("Genoa", snp=99)),
        chip_ids=(REPORT[0x1A0:0x1E0],),
        min_svn=4,
    )
    assert judge(REPORT, VCEK, policy=good).accepted
    for change, code in (
        ({"measurements": (bytes(48),)}, "measurement"),
        ({"report_data": b"other"}, "report-data"),
        ({"host_data": (b"\1" * 32,)}, "host-data"),
        ({"tcb_floors": (SnpTcbFloor("Milan", microcode=0x74),)}, "tcb,tcb"),
        ({"tcb_floors": (SnpTcbFloor("Genoa"),)}, "tcb"),
        ({"chip_ids": (bytes(64),)}, "chip"),
        ({"min_svn": 5}, "svn"),
        ({"signers": (bytes(48),)}, "signer"),
        ({"kinds": frozenset({EvidenceKind.TDX})}, "kind"),
        ({"claims": {"smt": (False,)}}, "claim"),
        ({"pcrs": {7: (bytes(32),)}}, "pcr"),
        ({"nonce": "x"}, "nonce"),
        ({"issuers": ("https://example",)}, "issuer"),
    ):
        assert judge(REPORT, VCEK, policy=replace(good, **change)).codes == tuple(code.split(","))  # type: ignore[arg-type]


def test_no_signer_and_a_hidden_chip_are_nobodys() -> None:
    assert VLEK_REPORT[0xE0:0x110] == bytes(48)
    none = EvidencePolicy(max_vmpl=1, signers=(bytes(48),))
    assert judge(VLEK_REPORT, VLEK, policy=none).codes == ("signer",)


def test_recognised() -> None:
    assert recognise(REPORT) is EvidenceKind.SNP


@settings(max_examples=200, deadline=None)
@given(offset=st.integers(0, 0x2A0 - 1), bit=st.integers(0, 7))
def test_every_signed_bit_counts(offset: int, bit: int) -> None:
    changed = bytearray(REPORT)
    changed[offset] ^= 1 << bit
    try:
        verdict = judge(bytes(changed), VCEK)
    except FormatError:
        return
    assert not verdict.accepted
    # Of a version, algorithm or key that is not known the signature is not looked at.
    assert {"signature", "unsupported", "algorithm", "missing"} & set(verdict.codes)


# An object identifier of the certificate's own key, or its version, made one that nobody knows.
P384, EC_KEY = bytes.fromhex("06052b81040022"), bytes.fromhex("06072a8648ce3d0201")
VERSION_3, VERSION_5 = bytes.fromhex("a003020102"), bytes.fromhex("a003020104")


@pytest.mark.parametrize(
    ("known", "unknown"),
    [(P384, P384[:-1] + b"\x7e"), (EC_KEY, EC_KEY[:-1] + b"\x7e"), (VERSION_3, VERSION_5)],
)
def test_a_certificate_that_cannot_be_read_is_a_refusal(known: bytes, unknown: bytes) -> None:
    assert known in VCEK
    assert judge(REPORT, VCEK.replace(known, unknown, 1)).codes == ("chain",)


def test_what_is_too_large_for_a_certificate_is_not_kept() -> None:
    before = amd._endorsement_key.cache_info().currsize
    assert "larger than" in str(amd.endorsement_key(bytes(amd.MAX_CERTIFICATE_SIZE + 1)))
    assert amd._endorsement_key.cache_info().currsize == before
