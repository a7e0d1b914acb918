"""`imagetool attest verify` on every file of evidence that there is: what is genuine, and what is refused and why."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from encfs.errors import ConflictError, EvidenceRefusedError, FormatError, NotFoundError, UsageError
from tests.integration.test_tpm_sealing import ok, refused, run
from tests.support.documented import assert_as_documented

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
THEN = ("--at", "2025-06-20")
BARE = (*THEN, "--allow-missing-collateral")
CHALLENGE = ("--report-data", b"challenge".hex())
TDX = ("--collateral", str(FIXTURES / "tdx" / "quote-v4-collateral.json"))
SGX = ("--collateral", str(FIXTURES / "sgx" / "quote-v3-collateral.json"))


def verdict(name: str, *options: str) -> tuple[int, dict[str, object]]:
    code, out, err = run("imagetool", "attest", "verify", str(FIXTURES / name), *options, "--json")
    document = json.loads(out)
    assert document["accepted"] == (code == 0)
    assert err.count("\n") == (0 if code == 0 else 1)
    return code, document


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("snp/report-vcek.bin", ("--chain", str(FIXTURES / "snp" / "vcek.der"), *THEN), "snp"),
        ("snp/report-vlek.bin", ("--chain", str(FIXTURES / "snp" / "vlek.der"), *THEN, "--max-vmpl", "1"), "snp"),
        ("tdx/quote-v4.dat", (*THEN, *TDX), "tdx"),
        ("tdx/quote-v4.dat", (*THEN, *SGX, *TDX), "tdx"),
        ("sgx/quote-v3.dat", (*THEN, *SGX, *TDX, "--tcb-status", "ConfigurationAndSWHardeningNeeded"), "sgx"),
        ("tdx/quote-v5.dat", BARE, "tdx"),
        ("sgx/quote-v3.dat", BARE, "sgx"),
        ("sgx/quote-occlum.dat", (*BARE, "--allow-debug"), "sgx"),
        ("azure/snp-evidence-v1.json", (*THEN, *CHALLENGE), "azure-snp-vtpm"),
        ("azure/tdx-evidence-v1.json", (*BARE, *CHALLENGE), "azure-tdx-vtpm"),
    ],
)
def test_genuine(name: str, options: tuple[str, ...], kind: str) -> None:
    code, document = verdict(name, *options)
    assert (code, document["kind"], document["reasons"]) == (0, kind, [])
    # People are told the same.
    lines = ok("imagetool", "attest", "verify", str(FIXTURES / name), *options).splitlines()
    assert lines[0].endswith(f": {kind}, accepted")


@pytest.mark.parametrize(
    ("name", "options", "codes"),
    [
        ("snp/report-vcek.bin", (), ["missing"]),
        ("snp/report-vcek.bin", ("--chain", str(FIXTURES / "snp" / "vlek.der")), ["missing"]),
        ("tdx/quote-v4.dat", THEN, ["missing"]),
        ("tdx/quote-v4.dat", (*THEN, *SGX), ["missing"]),
        ("tdx/quote-v4-debug.dat", BARE, ["debug"]),
        ("tpm/evidence.json", (), ["missing"]),
        ("azure/snp-evidence-v1.json", (*THEN, "--report-data", "00"), ["report-data"]),
        ("azure/snp-evidence-v1.json", (*THEN, "--kind", "snp"), ["kind"]),
        ("azure/snp-evidence-v1.json", (*THEN, "--pcr", f"4={'00' * 32}"), ["measurement", "pcr"]),
        ("azure/snp-evidence-v1.json", (*THEN, "--tcb-floor", "microcode=255"), ["tcb", "tcb"]),
        ("snp/report-vlek.bin", ("--chain", str(FIXTURES / "snp" / "vlek.der"), *THEN), ["vmpl"]),
        ("sgx/quote-occlum.dat", BARE, ["debug"]),
        ("sgx/quote-v3.dat", (*BARE, "--min-svn", "9", "--product-id", "7"), ["product", "svn"]),
        ("tdx/quote-v5.dat", (*BARE, "--rtmr", f"1={'00' * 48}"), ["rtmr"]),
    ],
)
def test_refused(name: str, options: tuple[str, ...], codes: list[str]) -> None:
    code, document = verdict(name, *options)
    assert code == EvidenceRefusedError.exit_code
    reasons = document["reasons"]
    assert isinstance(reasons, list)
    assert sorted(reason["code"] for reason in reasons) == codes


def test_the_verdict_is_as_documented(tmp_path: Path) -> None:
    _, document = verdict("snp/report-vcek.bin", "--chain", str(FIXTURES / "snp" / "vcek.der"), "--measurement", "00")
    assert_as_documented("imagetool attest verify", document, but=("warnings", "claims"))


def test_debug_only_where_it_is_asked_for() -> None:
    assert verdict("tdx/quote-v4-debug.dat", *BARE, "--allow-debug")[0] == 0


def test_an_enrolled_key(tmp_path: Path) -> None:
    import base64

    genuine = json.loads((FIXTURES / "tpm" / "evidence.json").read_text())
    pem = f"-----BEGIN PUBLIC KEY-----\n{genuine['ak_public']}\n-----END PUBLIC KEY-----\n"
    (tmp_path / "ak.pub").write_text(pem)
    assert base64.b64decode(genuine["ak_public"])
    assert verdict("tpm/evidence.json", "--attestation-key", str(tmp_path / "ak.pub"))[0] == 0


def test_what_is_no_evidence_and_no_policy(tmp_path: Path) -> None:
    report = str(FIXTURES / "snp" / "report-vcek.bin")
    command = ("imagetool", "attest", "verify")
    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(1 << 21))
    copy = shutil.copy(TDX[1], str(tmp_path))
    assert "is empty" in refused(FormatError, *command, str(tmp_path / "empty"))
    assert "larger than" in refused(FormatError, *command, str(tmp_path / "large"))
    assert "empty" in refused(FormatError, *command, report, "--collateral", str(tmp_path / "empty"))
    assert "are both Intel's" in refused(ConflictError, *command, report, *TDX, "--collateral", copy)
    refused(NotFoundError, *command, str(tmp_path / "none"))
    for options in (
        ("--measurement", "xy"),
        ("--pcr", "24=00"),
        ("--pcr", "000099=" + "00" * 32),
        ("--pcr", "1=00"),
        ("--rtmr", "4=" + "00" * 48),
        ("--tcb-floor", "speed=1"),
        ("--tcb-floor", "snp=256"),
        ("--kind", "sev"),
        ("--at", "yesterday"),
    ):
        refused(UsageError, *command, report, *options)
