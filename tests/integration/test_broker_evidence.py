"""Evidence of every kind through the running broker, recorded on real machines, and what rules make of it.

A recording is bound to its own day's nonce, never to a session of ours. So the broker must find everything else in
order (signatures up to the makers' roots, collateral, certificates), and refuse for the binding alone; what a rule
says about the same evidence is asked of the place that decides, with the binding that was recorded.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from encfs.attestation.evidence import Endorsements, Evidence
from encfs.attestation.kbs import TEE_NAMES, from_kbs_evidence, to_kbs_evidence
from encfs.attestation.parsing import parse_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verify import verify_evidence
from encfs.encoding import b64_decode, b64_encode
from imagetool.broker.decisions import Wanted, decide
from imagetool.broker.endorsements import EndorsementDirectory, EndorsementStore
from imagetool.broker.policy import parse_policy
from imagetool.broker.state import KEY, Entry
from tests.support.broker import PATH, Handshake, Served, configure, imagetool, make_broker, serving
from tests.support.documented import assert_as_documented
from tests.support.waiting import wait_until

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
NOW = datetime(2025, 6, 20, tzinfo=UTC)
TDX_DAY = "tdx/quote-v4-collateral.json"
SGX_DAY = "sgx/quote-v3-collateral.json"
ADDRESSES = itertools.count(1)
TPM = json.loads((FIXTURES / "tpm" / "evidence.json").read_text())
AK = b64_encode(b64_decode(TPM["ak_public"], "ak_public"))
RULES = "".join(
    f'[key."{tee}/key/chat"]\ntee = "{tee}"\nany_workload = true\n' for tee in ("snp", "tdx", "sgx", "az-snp-vtpm")
) + (
    '[key."az-tdx-vtpm/key/chat"]\ntee = "az-tdx-vtpm"\nany_workload = true\nallow_missing_collateral = true\n'
    f'[key."tpm/key/chat"]\ntee = "tpm"\nattestation_keys = ["{AK}"]\nany_workload = true\n'
)


def recorded(name: str, *certificates: str) -> Evidence:
    found = parse_evidence((FIXTURES / name).read_bytes())
    more = tuple((FIXTURES / one).read_bytes() for one in certificates)
    return Evidence(found.kind, found.content, Endorsements(found.endorsements.certificates + more))


GENUINE = {
    "snp": recorded("snp/report-vcek.bin", "snp/vcek.der"),
    "snp-vlek": recorded("snp/report-vlek.bin", "snp/vlek.der"),
    "tdx": recorded("tdx/quote-v4.dat"),
    "sgx": recorded("sgx/quote-v3.dat"),
    "az-snp-vtpm": recorded("azure/snp-evidence-v1.json"),
    "az-tdx-vtpm": recorded("azure/tdx-evidence-v1.json"),
    "tpm": recorded("tpm/evidence.json"),
}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One broker for hosts of two families of Intel's platforms, and all others."""
    made = make_broker(tmp_path_factory.mktemp("evidence") / "b", policy=RULES)
    (made / "endorsements").mkdir()
    for collateral in (TDX_DAY, SGX_DAY):
        shutil.copy(FIXTURES / collateral, made / "endorsements")
    configure(made, endorsements="endorsements", rate=5000, burst=10000)
    with serving(made, command=[sys.executable, "-m", "tests.support.pastbroker", NOW.isoformat()]) as served:
        yield served


def refused(broker: Served, evidence: Evidence | dict[str, Any], tee: str | None = None) -> list[str]:
    """The codes in the log of a session that offered this evidence; it must get nothing."""
    if isinstance(evidence, Evidence):
        tee, document = TEE_NAMES[evidence.kind], to_kbs_evidence(evidence)
    else:
        document = evidence
    assert tee is not None
    # Of one address only so many are in the log one by one.
    source = f"127.0.1.{next(ADDRESSES)}"
    client = Handshake(broker.url, broker.ca, tee=tee, evidence=lambda _data: document, source=source).begin()
    answer = client.attest()
    assert (answer.status, answer.kind) == (401, "AttestationFailed")
    for path in (PATH, f"{tee}/key/chat"):
        assert client.resource(path).kind == "SessionNotFound"
    entry = imagetool("broker", "releases", broker.directory)["entries"][-1]
    assert (entry["event"], entry["tee"]) == ("refused-evidence", tee)
    return [one["code"] for one in entry["reasons"]]


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_evidence_fails_only_where_it_is_not_bound(broker: Served, name: str) -> None:
    assert refused(broker, GENUINE[name]) == ["report-data"]
    claims = imagetool("broker", "releases", broker.directory)["entries"][-1]["claims"]
    if name in ("tdx", "sgx"):  # judged by the collateral of its platform, of two
        assert claims["tcb_status"] == {"tdx": "UpToDate", "sgx": "ConfigurationAndSWHardeningNeeded"}[name]
    elif name == "az-tdx-vtpm":
        assert (claims["fmspc"], "tcb_status" in claims) == ("00806f050000", False)


def test_until_when_collateral_is_valid_shows(broker: Served) -> None:
    """To whoever watches the figures, in the log, and by a command; new files are taken over without a restart."""
    client = Handshake(broker.url, broker.ca)
    name = 'encfs_broker_collateral_expiry_timestamp_seconds{ca="platform",fmspc="b0c06f000000",tee="tdx"}'
    assert f"{name} 1.752919235e+09" in client.request("GET", "/metrics").body.decode()
    told = "the collateral for FMSPC b0c06f000000 (tdx, platform CA) has expired"
    wait_until(lambda: told in broker.errors.read_text())
    listed = imagetool("broker", "endorsements", broker.directory)
    assert [(one["file"], one["fmspc"], one["state"]) for one in listed["collateral"]] == [
        ("quote-v3-collateral.json", "00a067110000", "expired"),
        ("quote-v4-collateral.json", "b0c06f000000", "expired"),
    ]
    assert len(listed["warnings"]) == 2
    del listed["stderr"]
    assert_as_documented("imagetool broker endorsements", listed)
    # Of a family that nothing here is of, so that no other test misses it.
    other = name.replace("b0c06f000000", "b0c06f0000ff")
    file = broker.directory / "endorsements" / "other.json"
    file.write_text((FIXTURES / TDX_DAY).read_text().replace("B0C06F000000", "B0C06F0000FF"))
    wait_until(lambda: all(other in client.request("GET", "/metrics").body.decode() for _ in range(8)))
    file.unlink()
    wait_until(lambda: all(other not in client.request("GET", "/metrics").body.decode() for _ in range(8)))


def _flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("name", "at", "code"),
    [
        ("snp", 0x90, "signature"),
        ("snp", 0x2A0, "signature"),
        ("snp-vlek", 0x90, "signature"),
        ("tdx", 48 + 136, "signature"),
        ("tdx", 48 + 584 + 4, "signature"),
    ],
)
def test_altered_evidence(broker: Served, name: str, at: int, code: str) -> None:
    genuine = GENUINE[name]
    assert code in refused(broker, Evidence(genuine.kind, _flipped(genuine.content, at), genuine.endorsements))


def test_certificates_of_nobody_of_another_chip_and_of_another_key(broker: Served) -> None:
    report = GENUINE["snp"]
    for certificate in ("snp/vcek-invalid-new.der", "snp/vcek-invalid-legacy.der"):
        document = to_kbs_evidence(report)
        document["cert_chain"] = [{"cert_type": "VCEK", "data": list((FIXTURES / certificate).read_bytes())}]
        assert "chain" in refused(broker, document, "snp")
    for certificate in (b"", b"\x30\x03\x02\x01\x00", bytes(9000)):
        document["cert_chain"] = [{"cert_type": "VCEK", "data": list(certificate)}]
        assert "report-data" in (codes := refused(broker, document, "snp"))
        assert len(codes) > 1
    document["cert_chain"] = [{"cert_type": "VCEK", "data": list((FIXTURES / "snp/vcek-turin.der").read_bytes())}]
    assert "signature" in refused(broker, document, "snp")


@pytest.mark.parametrize("part", ["signature", "message"])
def test_altered_quotes_of_tpms(broker: Served, part: str) -> None:
    for name, tee in (("azure/snp-evidence-v1.json", "az-snp-vtpm"), ("azure/tdx-evidence-v1.json", "az-tdx-vtpm")):
        document = json.loads((FIXTURES / name).read_text())
        quote = document["tpm_quote"]
        content = bytes.fromhex(quote[part])
        quote[part] = _flipped(content, len(content) - 1).hex()
        assert "signature" in refused(broker, document, tee)
    document = json.loads(json.dumps(TPM))
    content = b64_decode(document["tpm_quote"][part], part)
    document["tpm_quote"][part] = b64_encode(_flipped(content, len(content) - 1))
    assert "signature" in refused(broker, document, "tpm")


def test_parts_of_two_machines(broker: Served) -> None:
    """The vTPM's quote of one, the hardware's report of another."""
    document = json.loads((FIXTURES / "azure/snp-evidence-v1.json").read_text())
    other = (FIXTURES / "azure/snp-hcl-report.bin").read_bytes()
    document["hcl_report"] = base64.urlsafe_b64encode(other).decode()
    assert "signature" in refused(broker, document, "az-snp-vtpm")


def test_a_tpm_that_was_not_enrolled(broker: Served) -> None:
    document = json.loads((FIXTURES / "azure/snp-evidence-v1.json").read_text())
    stranger = TPM | {"ak_public": AK[:-8] + ("AAAAAAA=" if AK.endswith("=") else "AAAAAAAA")}
    client = Handshake(broker.url, broker.ca, tee="tpm", evidence=lambda _data: stranger).begin()
    assert client.attest().status in (400, 401)
    client = Handshake(broker.url, broker.ca, tee="tpm", evidence=lambda _data: document).begin()
    assert (client.attest().status, client.resource().status) == (400, 401)


# What a rule says about it


def _decided(evidence: Evidence, rule: str, store: EndorsementStore, now: datetime = NOW) -> list[str]:
    """The codes of the decision, where the session is the one that was recorded."""
    tee = TEE_NAMES[evidence.kind]
    policy = parse_policy(f'[key."{PATH}"]\ntee = "{tee}"\n{rule}\n')
    shown = verify_evidence(evidence, EvidencePolicy(), now=NOW).claims["report_data"]
    decision = decide(
        Wanted(PATH, None),
        Entry(PATH, KEY, None, None, 1),
        policy.rule_for(PATH),
        from_kbs_evidence(tee, to_kbs_evidence(evidence)),
        bytes.fromhex(str(shown)),
        store,
        demo=False,
        now=now,
    )
    assert decision.released == (not decision.reasons)
    return [one.code for one in decision.reasons]


@pytest.fixture
def store(tmp_path: Path, request: pytest.FixtureRequest) -> EndorsementStore:
    shutil.copy(FIXTURES / request.param, tmp_path)
    return EndorsementDirectory(tmp_path).store


MRTD = GENUINE["tdx"].content[48 + 136 : 48 + 184].hex()
MRENCLAVE = GENUINE["sgx"].content[48 + 64 : 48 + 96].hex()
ALL_PCRS = TPM["tpm_quote"]["pcrs"]


@pytest.mark.parametrize(
    ("evidence", "rule", "store", "codes"),
    [
        (GENUINE["tdx"], f'measurements = "{MRTD}"', TDX_DAY, []),
        (GENUINE["tdx"], f'measurements = "{"00" * 48}"', TDX_DAY, ["measurement"]),
        (GENUINE["tdx"], f'measurements = "{MRTD}"', SGX_DAY, ["missing"]),
        (GENUINE["tdx"], f'measurements = "{MRTD}"\nrtmrs = {{ 0 = "{"00" * 48}" }}', TDX_DAY, ["rtmr"]),
        (recorded("tdx/quote-v4-debug.dat"), "any_workload = true\nallow_missing_collateral = true", TDX_DAY, None),
        (GENUINE["sgx"], f'measurements = "{MRENCLAVE}"', SGX_DAY, ["tcb-status"]),
        (
            GENUINE["sgx"],
            f'measurements = "{MRENCLAVE}"\ntcb_statuses = ["UpToDate", "ConfigurationAndSWHardeningNeeded"]',
            SGX_DAY,
            [],
        ),
        (GENUINE["tpm"], f'attestation_keys = "{AK}"\npcrs = {{ 0 = "{ALL_PCRS[0]}" }}', TDX_DAY, []),
        (GENUINE["tpm"], f'attestation_keys = "{AK}"\npcrs = {{ 0 = "{"11" * 32}" }}', TDX_DAY, ["pcr"]),
        (GENUINE["az-snp-vtpm"], "any_workload = true", TDX_DAY, []),
        (
            GENUINE["az-snp-vtpm"],
            f'any_workload = true\npcrs = {{ 7 = "{"11" * 32}" }}',
            TDX_DAY,
            ["pcr", "measurement"],
        ),
        (GENUINE["az-tdx-vtpm"], "any_workload = true", TDX_DAY, ["missing"]),
        (GENUINE["snp"], "any_workload = true\nmax_vmpl = 1", TDX_DAY, []),
        (GENUINE["snp"], f'measurements = "{"00" * 48}"\nmax_vmpl = 1', TDX_DAY, ["measurement"]),
        (GENUINE["snp"], "any_workload = true\nmax_vmpl = 1\ntcb = [{ microcode = 255 }]", TDX_DAY, ["tcb", "tcb"]),
    ],
    indirect=["store"],
)
def test_rules_about_recorded_evidence(
    evidence: Evidence, rule: str, store: EndorsementStore, codes: list[str] | None
) -> None:
    found = _decided(evidence, rule, store)
    assert ("debug" in found) if codes is None else (found == codes)


def test_without_collateral_where_a_rule_allows_it() -> None:
    nothing = EndorsementStore({})
    for name in ("tdx", "az-tdx-vtpm"):
        assert _decided(GENUINE[name], "any_workload = true", nothing) == ["missing"]
        assert _decided(GENUINE[name], "any_workload = true\nallow_missing_collateral = true", nothing) == []


@pytest.mark.parametrize("store", [TDX_DAY], indirect=True)
@pytest.mark.parametrize("year", [2020, 2060])
def test_a_clock_that_is_off(store: EndorsementStore, year: int) -> None:
    """Collateral and certificates are of their day: a broker whose clock is far off releases nothing for them."""
    then = datetime(year, 6, 20, tzinfo=UTC)
    assert "expired" in _decided(GENUINE["tdx"], f'measurements = "{MRTD}"', store, then)
    assert "expired" in _decided(GENUINE["snp"], "any_workload = true\nmax_vmpl = 1", store, then)
