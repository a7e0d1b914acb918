"""What the broker knows beside the evidence: certificates and collateral of the operator's directory."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.parsing import parse_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verify import verify_evidence
from encfs.errors import FormatError, NotFoundError
from imagetool.broker.endorsements import EndorsementStore, load_endorsements

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
NOW = datetime(2025, 6, 20, tzinfo=UTC)
COLLATERAL = FIXTURES / "tdx" / "quote-v4-collateral.json"


@pytest.fixture
def store(tmp_path: Path) -> EndorsementStore:
    for name, file in (("a.der", "snp/vcek.der"), ("b.pem", "snp/vcek-genoa.pem"), ("c.crt", "snp/vlek.der")):
        (tmp_path / name).write_bytes((FIXTURES / file).read_bytes())
    (tmp_path / "collateral.json").write_bytes(COLLATERAL.read_bytes())
    (tmp_path / "README").write_text("not read")
    return load_endorsements(tmp_path)


def codes(evidence: Evidence, store: EndorsementStore, policy: EvidencePolicy) -> tuple[str, ...]:
    return verify_evidence(evidence, policy, endorsements=store.for_evidence(evidence), now=NOW).codes


def test_certificates_of_chips_and_providers(store: EndorsementStore) -> None:
    report = parse_evidence((FIXTURES / "snp" / "report-vcek.bin").read_bytes())
    of_provider = parse_evidence((FIXTURES / "snp" / "report-vlek.bin").read_bytes())
    policy = EvidencePolicy(max_vmpl=1)
    assert codes(report, store, policy) == codes(of_provider, store, policy) == ()
    assert codes(report, EndorsementStore({}), policy) == ("missing",)
    # What the host put beside the report may be of no use: another chip's, or nobody's.
    for other in ("vcek-genoa.pem", "vcek-invalid-new.der"):
        beside = Endorsements(((FIXTURES / "snp" / other).read_bytes(),))
        assert codes(replace(report, endorsements=beside), store, policy) == ()


@pytest.mark.parametrize("name", ["tdx/quote-v4.dat", "azure/tdx-evidence-v1.json"])
def test_collateral_for_whatever_holds_a_quote(store: EndorsementStore, name: str) -> None:
    evidence = parse_evidence((FIXTURES / name).read_bytes())
    assert codes(evidence, EndorsementStore({}), EvidencePolicy()) == ("missing",)
    # The one is not of the other's platform, which is another reason than not to have any.
    wanted = () if evidence.kind is EvidenceKind.TDX else ("collateral",)
    assert codes(evidence, store, EvidencePolicy()) == wanted


def test_files_of_no_use_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load_endorsements(tmp_path / "absent")
    (tmp_path / "root.der").write_bytes(b"\x30\x03\x02\x01\x00")
    with pytest.raises(FormatError, match=r"root\.der"):
        load_endorsements(tmp_path)
    (tmp_path / "root.der").unlink()
    (tmp_path / "none.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(FormatError, match=r"none\.pem"):
        load_endorsements(tmp_path)
