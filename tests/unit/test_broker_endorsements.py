"""What the broker knows beside the evidence: certificates and collateral of the operator's directory."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from encfs.attestation.evidence import Endorsements, Evidence
from encfs.attestation.parsing import parse_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verify import verify_evidence
from encfs.errors import ConflictError, FormatError, NotFoundError
from imagetool.broker.endorsements import EndorsementDirectory, EndorsementStore, Reminder

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
NOW = datetime(2025, 6, 20, tzinfo=UTC)
TDX_COLLATERAL = FIXTURES / "tdx" / "quote-v4-collateral.json"
SGX_COLLATERAL = FIXTURES / "sgx" / "quote-v3-collateral.json"


@pytest.fixture
def store(tmp_path: Path) -> EndorsementStore:
    for name, file in (("a.der", "snp/vcek.der"), ("b.pem", "snp/vcek-genoa.pem"), ("c.crt", "snp/vlek.der")):
        (tmp_path / name).write_bytes((FIXTURES / file).read_bytes())
    (tmp_path / "collateral.json").write_bytes(TDX_COLLATERAL.read_bytes())
    (tmp_path / "older hosts.json").write_bytes(SGX_COLLATERAL.read_bytes())
    (tmp_path / "README").write_text("not read")
    return EndorsementDirectory(tmp_path).store


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


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tdx/quote-v4.dat", ()),
        ("sgx/quote-v3.dat", ("tcb-status",)),
        ("tdx/quote-v5.dat", ("missing",)),
        ("azure/tdx-evidence-v1.json", ("missing",)),
    ],
)
def test_collateral_for_whatever_holds_a_quote(store: EndorsementStore, name: str, wanted: tuple[str, ...]) -> None:
    evidence = parse_evidence((FIXTURES / name).read_bytes())
    assert codes(evidence, EndorsementStore({}), EvidencePolicy()) == ("missing",)
    assert codes(evidence, store, EvidencePolicy()) == wanted


def test_files_of_no_use_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        EndorsementDirectory(tmp_path / "absent")
    (tmp_path / "root.der").write_bytes(b"\x30\x03\x02\x01\x00")
    with pytest.raises(FormatError, match=r"root\.der"):
        EndorsementDirectory(tmp_path)
    (tmp_path / "root.der").unlink()
    (tmp_path / "none.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    with pytest.raises(FormatError, match=r"none\.pem"):
        EndorsementDirectory(tmp_path)
    (tmp_path / "none.pem").unlink()
    (tmp_path / "quotes.json").write_text("{}")
    with pytest.raises(FormatError, match=r"quotes\.json"):
        EndorsementDirectory(tmp_path)
    for name in ("quotes.json", "again.json"):
        (tmp_path / name).write_bytes(TDX_COLLATERAL.read_bytes())
    with pytest.raises(ConflictError, match=r"again\.json and quotes\.json"):
        EndorsementDirectory(tmp_path)


def test_changes_are_taken_over(tmp_path: Path) -> None:
    directory = EndorsementDirectory(tmp_path)
    assert not directory.refresh()
    (tmp_path / "tdx.json").write_bytes(TDX_COLLATERAL.read_bytes())
    assert directory.refresh()
    assert [one.name for one in directory.store.collateral] == ["tdx.json"]
    # Half a file changes nothing, and is told once.
    (tmp_path / "sgx.json").write_bytes(SGX_COLLATERAL.read_bytes()[:1000])
    with pytest.raises(FormatError, match=r"sgx\.json"):
        directory.refresh()
    assert not directory.refresh()
    assert [one.name for one in directory.store.collateral] == ["tdx.json"]
    (tmp_path / "sgx.json").write_bytes(SGX_COLLATERAL.read_bytes())
    (tmp_path / "tdx.json").unlink()
    assert directory.refresh()
    assert [one.name for one in directory.store.collateral] == ["sgx.json"]
    assert not EndorsementDirectory(None).refresh()


def test_the_operator_hears_of_it_before_it_ends(store: EndorsementStore) -> None:
    ends = min(one.collateral.expires for one in store.collateral)
    assert store.warnings(ends - timedelta(days=8)) == []
    soon = store.warnings(ends - timedelta(days=6))
    assert len(soon) == 2
    assert "collateral.json: the collateral for FMSPC b0c06f000000 (tdx, platform CA) expires (2025-07-19T" in soon[0]
    over = store.warnings(ends)
    assert ["has expired" in line for line in over] == [True, False]
    assert [one.state(ends) for one in store.collateral] == ["expired", "expiring"]


def test_the_log_says_so_once_a_day_and_at_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "e").mkdir()
    directory = EndorsementDirectory(tmp_path / "e")
    reminder = Reminder(directory)
    with caplog.at_level(logging.WARNING, logger="imagetool.broker.endorsements"):
        reminder.look()
        (tmp_path / "e" / "tdx.json").write_bytes(TDX_COLLATERAL.read_bytes())
        reminder.look()
        reminder.look()
        assert ["has expired" in one.message for one in caplog.records] == [True]
        (tmp_path / "e").rename(tmp_path / "elsewhere")
        reminder.look()
        reminder.look()
        assert ["does not exist" in one.message for one in caplog.records] == [False, True]
    assert len(directory.store.collateral) == 1
