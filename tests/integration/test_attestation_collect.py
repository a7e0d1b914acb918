"""Collecting evidence through every interface: what comes out verifies, or is what the verifier would be shown."""

from __future__ import annotations

import base64
import errno
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from encfs.attestation.collect.sources import Machine, evidence_source, unavailable
from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.kbs import from_kbs_evidence, to_kbs_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.quotes import parse_quote
from encfs.attestation.snp import parse_report
from encfs.attestation.verify import verify_evidence
from encfs.errors import AttestationError, KeyFileError, UsageError
from encfs.tpm.keyfile import load_object, write_object
from encfs.tpm.quote import attestation_public_key, create_attestation_key
from encfs.webclient import Address
from tests.integration.test_tpm_quote import persistent_ak
from tests.integration.test_tpm_sealing import ok, refused
from tests.support.documented import assert_as_documented
from tests.support.occlum import LibraryOs
from tests.support.sev_guest import Firmware, certificate_table
from tests.support.tpm import SoftwareTpm, tpm
from tests.support.tsm import Provider, serving

__all__ = ["tpm"]

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
REPORT = (FIXTURES / "snp" / "report-vcek.bin").read_bytes()
VCEK = (FIXTURES / "snp" / "vcek.der").read_bytes()
TDX = (FIXTURES / "tdx" / "quote-v4.dat").read_bytes()
SGX = (FIXTURES / "sgx" / "quote-v3.dat").read_bytes()
DATA = bytes(range(48))
NOW = datetime(2025, 6, 20, tzinfo=UTC)


@pytest.fixture
def nowhere(tmp_path: Path) -> Machine:
    """A machine that has nothing."""
    return Machine(*(tmp_path / name for name in ("tsm", "sev-guest", "gramine", "occlum", "chassis")))


def test_snp_through_configfs(nowhere: Machine) -> None:
    with serving(Provider("sev_guest", REPORT, 0x50, certificate_table(VCEK))) as root:
        source = evidence_source(machine=replace(nowhere, tsm=root))
        assert source.tee == "snp"
        evidence = source.collect(DATA)
    assert parse_report(evidence.content).report_data == DATA.ljust(64, b"\0")
    assert evidence.endorsements.certificates == (VCEK,)
    # What firmware signed is what the fixture has: with its own report data it verifies, over the protocol's form too.
    again = from_kbs_evidence("snp", to_kbs_evidence(replace(evidence, content=REPORT)))
    assert verify_evidence(again, EvidencePolicy(), now=NOW).codes == ()


def test_tdx_through_configfs(nowhere: Machine) -> None:
    with serving(Provider("tdx_guest", TDX, 48 + 520)) as root:
        machine = replace(nowhere, tsm=root)
        source = evidence_source(machine=machine)
        assert source.tee == "tdx"
        assert parse_quote(source.collect(DATA).content).body["report_data"] == DATA.ljust(64, b"\0")
        with pytest.raises(AttestationError, match="gives evidence of tdx, not of snp"):
            evidence_source("snp", machine=machine).collect(DATA)


def test_requests_of_others_and_refusals_of_the_kernel(nowhere: Machine) -> None:
    for provider, message in (
        (Provider("sev_guest", REPORT, 0x50, racing=True), "changed by another program"),
        (Provider("sev_guest", REPORT, 0x50, failing=True), "outblob of configfs-tsm fails: Input/output error"),
        (Provider("sev_guest", REPORT[:-1], 0x50), "an SNP report of 1183 bytes"),
        (Provider("sev_guest", REPORT, 0x50, b"\1" * 30), "malformed certificate table"),
        (Provider("tdx_guest", REPORT, 0x50), "no TDX quote"),
    ):
        with serving(provider) as root, pytest.raises(AttestationError, match=message):
            evidence_source(machine=replace(nowhere, tsm=root)).collect(DATA)
    with serving(Provider("arm_cca_guest", REPORT, 0)) as root, pytest.raises(AttestationError, match="arm_cca_guest"):
        evidence_source(machine=replace(nowhere, tsm=root))


def test_snp_through_the_device_of_older_kernels(nowhere: Machine, tmp_path: Path) -> None:
    (tmp_path / "sev-guest").touch()
    firmware = Firmware(report=REPORT, certificates=certificate_table(VCEK))
    source = evidence_source(machine=replace(nowhere, ioctl=firmware.ioctl))
    assert source.kind is EvidenceKind.SNP
    assert parse_report(source.collect(DATA).content).report_data[:48] == DATA


def test_gramine(nowhere: Machine, tmp_path: Path) -> None:
    root = tmp_path / "gramine"
    root.mkdir()
    (root / "attestation_type").write_text("dcap\n")
    (root / "user_report_data").write_bytes(bytes(64))
    (root / "quote").write_bytes(SGX)
    source = evidence_source(machine=nowhere)
    assert source.tee == "sgx"
    evidence = source.collect(DATA)
    assert (root / "user_report_data").read_bytes() == DATA.ljust(64, b"\0")
    policy = EvidencePolicy(allow_missing_collateral=True)
    assert verify_evidence(from_kbs_evidence("sgx", to_kbs_evidence(evidence)), policy, now=NOW).codes == ()
    (root / "quote").write_bytes(SGX[:40])
    with pytest.raises(AttestationError, match="no SGX quote"):
        source.collect(DATA)
    (root / "attestation_type").write_text("none\n")
    with pytest.raises(AttestationError, match="remote_attestation = 'none'"):
        source.collect(DATA)


def test_occlum(nowhere: Machine, tmp_path: Path) -> None:
    (tmp_path / "occlum").touch()
    enclave = LibraryOs(SGX, 48 + 320)
    source = evidence_source(machine=replace(nowhere, ioctl=enclave.ioctl))
    assert source.tee == "sgx"
    evidence = source.collect(DATA)
    assert enclave.requests == [0x80047307, 0xC0187308]
    assert parse_quote(evidence.content).body["report_data"] == DATA.ljust(64, b"\0")
    # With the report data that was signed it verifies, over the protocol's form too; with another it does not.
    signed = parse_quote(SGX).body["report_data"]
    policy = EvidencePolicy(allow_missing_collateral=True)
    for data, codes in ((signed, ()), (DATA, ("signature",))):
        form = to_kbs_evidence(source.collect(data))
        assert verify_evidence(from_kbs_evidence("sgx", form), policy, now=NOW).codes == codes
    # What Occlum's own example gave: a debug enclave.
    example = LibraryOs((FIXTURES / "sgx" / "quote-occlum.dat").read_bytes(), 48 + 320)
    found = evidence_source("sgx", machine=replace(nowhere, ioctl=example.ioctl)).collect(DATA)
    assert "debug" in verify_evidence(found, policy, now=NOW).codes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"says": 0}, "a quote has 0 bytes"),
        ({"says": 1 << 31}, "a quote has 2147483648 bytes"),
        ({"says": 100}, "Occlum gives no quote: Invalid argument"),
        ({"wrote": len(SGX) + 1}, "longer than its buffer"),
        ({"wrote": 40}, "no SGX quote"),
        ({"error": errno.ENOTTY}, "Occlum gives no quote: Inappropriate ioctl"),
    ],
)
def test_an_occlum_that_misbehaves(nowhere: Machine, tmp_path: Path, changes: dict[str, int], message: str) -> None:
    (tmp_path / "occlum").touch()
    enclave = LibraryOs(SGX, 48 + 320, **changes)
    with pytest.raises(AttestationError, match=message):
        evidence_source("sgx", machine=replace(nowhere, ioctl=enclave.ioctl)).collect(DATA)


def test_a_device_of_that_name_that_is_not_occlums(nowhere: Machine, tmp_path: Path) -> None:
    # A driver's directory; and a real file, through the real ioctl.
    (tmp_path / "occlum").mkdir()
    with pytest.raises(AttestationError, match="no TEE"):
        evidence_source(machine=nowhere)
    (tmp_path / "occlum").rmdir()
    (tmp_path / "occlum").touch()
    with pytest.raises(AttestationError, match="Occlum gives no quote: Inappropriate ioctl"):
        evidence_source(machine=nowhere).collect(DATA)


class _MetadataService(http.server.BaseHTTPRequestHandler):
    """As Azure's: the VCEK for whoever asks politely, a TDX quote over a TDREPORT."""

    def do_GET(self) -> None:
        self._answer("/metadata/THIM/amd/certification", {"vcekCert": self.server.certificate})  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert len(base64.urlsafe_b64decode(asked["report"] + "==")) == 1024
        self._answer("/acc/tdquote", {"quote": base64.urlsafe_b64encode(TDX).decode()})

    def _answer(self, path: str, document: dict[str, str]) -> None:
        good = self.path == path and self.headers["Metadata"] == "true"
        content = json.dumps(document).encode()
        self.send_response(200 if good else 400)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_words: object) -> None:
        return


@contextmanager
def metadata_service(certificate: str) -> Iterator[Address]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _MetadataService)
    server.certificate = certificate  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Address("http", "127.0.0.1", server.server_port, "")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(("name", "tee"), [("snp", "az-snp-vtpm"), ("tdx", "az-tdx-vtpm")])
def test_azure(nowhere: Machine, tpm: SoftwareTpm, tmp_path: Path, name: str, tee: str) -> None:
    # An index of swtpm has 2048 bytes.
    report = tmp_path / "report"
    whole = (FIXTURES / "azure" / f"{name}-hcl-report.bin").read_bytes()
    report.write_bytes(_shortened(whole))
    tpm.tool("nvdefine", "0x01400001", "-C", "o", "-s", "2048", "-a", "ownerread|ownerwrite")
    tpm.tool("nvwrite", "0x01400001", "-C", "o", "-i", str(report))
    persistent_ak(tpm, "0x81000003")
    (tmp_path / "chassis").write_text("7783-7084-3265-9085-8269-3286-77\n")
    pem = json.loads((FIXTURES / "azure" / "snp-evidence-v0.json").read_text())["vcek"]
    with metadata_service(pem) as service:
        source = evidence_source(machine=replace(nowhere, metadata_service=service))
        assert source.tee == tee
        evidence = source.collect(DATA)
    document = to_kbs_evidence(evidence)
    known = json.loads((FIXTURES / "azure" / f"{name}-evidence-v1.json").read_text())
    assert set(document) == set(known)
    assert set(document["tpm_quote"]) == set(known["tpm_quote"])
    assert from_kbs_evidence(tee, document).kind is evidence.kind
    # The key of this TPM is not the one that the report vouches for, so the quote is not its.
    verdict = verify_evidence(evidence, EvidencePolicy(report_data=DATA, allow_missing_collateral=True), now=NOW)
    assert "signature" in verdict.codes
    assert "report-data" not in verdict.codes
    with metadata_service("none") as service, pytest.raises(AttestationError):
        evidence_source(tee, machine=replace(nowhere, metadata_service=replace(service, path="/x"))).collect(DATA)


def _shortened(report: bytes) -> bytes:
    """With runtime data that fits: the key alone, all that is read of it here."""
    size = int.from_bytes(report[1232:1236], "little")
    runtime = json.loads(report[1236 : 1236 + size])
    short = json.dumps({"keys": runtime["keys"][:1], "vm-configuration": {}}).encode()
    return (report[:1232] + len(short).to_bytes(4, "little") + short).ljust(2048, b"\0")


def test_the_quote_of_a_tpm(tpm: SoftwareTpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_object(create_attestation_key(), "ak.tpm")
    public = attestation_public_key(load_object("ak.tpm"))
    printed = ok("encfs", "attest", "collect", "--ak", "ak.tpm", "--report-data", DATA.hex())
    policy = EvidencePolicy(attestation_keys=(public,), report_data=DATA)
    assert verify_evidence(printed.encode(), policy, now=NOW).codes == ()
    made = json.loads(ok("encfs", "attest", "collect", "--ak", "ak.tpm", "-o", "evidence.json", "--json"))
    assert_as_documented("encfs attest collect", made)
    fresh = replace(policy, report_data=bytes.fromhex(made["report_data"]))
    assert verify_evidence(Path("evidence.json").read_bytes(), fresh, now=NOW).codes == ()


def test_requests_that_cannot_be(nowhere: Machine, tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match=r"no TEE .*configfs-tsm.*SEV-SNP.*Gramine.*Azure") as caught:
        evidence_source(machine=nowhere)
    assert caught.value.hint is not None
    assert "ak=FILE" in caught.value.hint
    with pytest.raises(KeyFileError, match="needs an attestation key"):
        evidence_source("tpm", machine=nowhere)
    with pytest.raises(KeyFileError, match="of no use with tee=snp"):
        evidence_source("snp", ak="x", machine=nowhere)
    with pytest.raises(KeyFileError, match="is not known"):
        evidence_source("sgx2", machine=nowhere)
    refused(UsageError, "encfs", "attest", "collect", "--tee", "sample", "--report-data", "xyz")
    refused(UsageError, "encfs", "attest", "collect", "--tee", "sample", "--report-data", "00" * 65)


def test_a_machine_of_azure_that_is_not_confidential(nowhere: Machine, tpm: SoftwareTpm, tmp_path: Path) -> None:
    (tmp_path / "chassis").write_text("7783-7084-3265-9085-8269-3286-77\n")
    with pytest.raises(AttestationError, match="does not hold the report of an Azure confidential VM"):
        evidence_source(machine=nowhere)


def test_what_providers_say(nowhere: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", f"device:{tmp_path}/none")
    assert "no TEE and no TPM: " in str(unavailable(nowhere))
    monkeypatch.setenv("TPM2TOOLS_TCTI", "swtpm:path=/somewhere")
    assert unavailable(nowhere) is None
