"""SGX and TDX quotes: genuine ones verify with collateral of their day, every other one is refused for its reason."""

from __future__ import annotations

import base64
import json
import struct
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.attestation.collateral import parse_collateral, require_one_each
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.kbs import from_kbs_evidence, to_kbs_evidence
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import verify_evidence
from encfs.errors import ConflictError, FormatError

EVIDENCE = Path(__file__).parents[2] / "fixtures" / "evidence"
NOW = datetime(2025, 6, 20, tzinfo=UTC)
LENIENT = EvidencePolicy(allow_missing_collateral=True)


def load(name: str) -> bytes:
    return (EVIDENCE / name).read_bytes()


TDX, TDX_COLLATERAL = load("tdx/quote-v4.dat"), load("tdx/quote-v4-collateral.json")
SGX, SGX_COLLATERAL = load("sgx/quote-v3.dat"), load("sgx/quote-v3-collateral.json")


def judge(
    quote: bytes,
    collateral: bytes | list[bytes] | None = None,
    policy: EvidencePolicy | None = None,
    now: datetime = NOW,
) -> Verdict:
    given = [collateral] if isinstance(collateral, bytes) else collateral or []
    known = Endorsements(collateral=tuple(parse_collateral(one, "collateral") for one in given))
    return verify_evidence(quote, policy or EvidencePolicy(), endorsements=known, now=now)


def test_a_genuine_tdx_quote_verifies() -> None:
    verdict = judge(TDX, TDX_COLLATERAL)
    assert verdict.accepted
    assert verdict.kind == "tdx"
    assert verdict.claims["tcb_status"] == "UpToDate"
    assert verdict.claims["debug"] is False


def test_the_tcb_status_decides() -> None:
    assert judge(SGX, SGX_COLLATERAL).codes == ("tcb-status",)
    allowed = EvidencePolicy(tcb_statuses=frozenset({"UpToDate", "ConfigurationAndSWHardeningNeeded"}))
    assert judge(SGX, SGX_COLLATERAL, allowed).accepted


@pytest.mark.parametrize("name", ["tdx/quote-v5.dat", "tdx/quote-v4.dat", "sgx/quote-v3.dat"])
def test_without_collateral_only_when_that_is_allowed(name: str) -> None:
    assert judge(load(name)).codes == ("missing",)
    verdict = judge(load(name), policy=LENIENT)
    assert verdict.accepted
    assert {"tcb-status", "revoked"} <= {reason.code for reason in verdict.unchecked}


@pytest.mark.parametrize("name", ["tdx/quote-v4-debug.dat", "sgx/quote-occlum.dat"])
def test_debug_is_refused_unless_allowed(name: str) -> None:
    assert judge(load(name), policy=LENIENT).codes == ("debug",)
    assert judge(load(name), policy=EvidencePolicy(allow_missing_collateral=True, allow_debug=True)).accepted


def test_collateral_must_be_current_and_of_this_platform() -> None:
    assert judge(TDX, TDX_COLLATERAL, now=NOW + timedelta(days=40)).codes == ("expired",)
    assert judge(TDX, TDX_COLLATERAL, now=NOW - timedelta(days=40)).codes == ("expired",)
    # Of another family of platforms, and of another TEE: the reason names what is missing.
    for quote, collateral, platform in (
        (load("tdx/quote-v5.dat"), TDX_COLLATERAL, "FMSPC 90c06f000000 (tdx, platform CA)"),
        (TDX, SGX_COLLATERAL, "FMSPC b0c06f000000 (tdx, platform CA)"),
        (SGX, TDX_COLLATERAL, "FMSPC 00a067110000 (sgx, processor CA)"),
    ):
        verdict = judge(quote, collateral)
        assert verdict.codes == ("missing",)
        assert f"collateral for {platform} was not given" in verdict.reasons[0].message
        assert judge(quote, collateral, LENIENT).accepted


def test_of_several_that_of_the_platform_counts() -> None:
    together = [SGX_COLLATERAL, TDX_COLLATERAL]
    assert judge(TDX, together).accepted
    assert judge(SGX, together).codes == ("tcb-status",)
    assert judge(TDX, together).claims["fmspc"] == "b0c06f000000"
    assert judge(load("tdx/quote-v5.dat"), together).codes == ("missing",)


def _changed(content: bytes, **members: object) -> bytes:
    return json.dumps(json.loads(content) | members).encode()


def test_what_collateral_says_of_itself_chooses_and_proves_nothing() -> None:
    """Whoever writes another platform's name into it has not made it Intel's."""
    named = json.loads(TDX_COLLATERAL)["tcb_info"].replace("B0C06F000000", "90C06F000000")
    assert judge(load("tdx/quote-v5.dat"), _changed(TDX_COLLATERAL, tcb_info=named)).codes == ("collateral",)
    later = json.loads(TDX_COLLATERAL)["tcb_info"].replace("2025-07-19", "2035-07-19")
    assert judge(TDX, _changed(TDX_COLLATERAL, tcb_info=later)).codes == ("collateral",)
    assert judge(TDX, _changed(TDX_COLLATERAL, tcb_info_signature="00" * 64)).codes == ("collateral",)
    # The processor CA's list of revoked platforms is not about this one.
    other = json.loads(SGX_COLLATERAL)
    mixed = _changed(TDX_COLLATERAL, pck_crl=other["pck_crl"], pck_crl_issuer_chain=other["pck_crl_issuer_chain"])
    assert judge(TDX, mixed).codes == ("missing",)


def test_collateral_ends_with_what_ends_first() -> None:
    tdx, sgx = (parse_collateral(one, "collateral") for one in (TDX_COLLATERAL, SGX_COLLATERAL))
    assert tdx.expires == datetime(2025, 7, 19, 10, 0, 35, tzinfo=UTC)  # its revocation list
    assert sgx.expires == datetime(2025, 7, 19, 10, 1, 18, tzinfo=UTC)  # its QE identity
    assert judge(TDX, TDX_COLLATERAL, now=tdx.expires - timedelta(seconds=1)).accepted
    assert judge(TDX, TDX_COLLATERAL, now=tdx.expires + timedelta(seconds=1)).codes == ("expired",)


def test_one_for_each_platform() -> None:
    tdx, sgx = (parse_collateral(one, "collateral") for one in (TDX_COLLATERAL, SGX_COLLATERAL))
    assert require_one_each([("a", tdx), ("b", sgx)]) == (tdx, sgx)
    with pytest.raises(ConflictError, match=r"a and c .* FMSPC b0c06f000000"):
        require_one_each([("a", tdx), ("b", sgx), ("c", tdx)])


TCB_INFO = json.loads(json.loads(TDX_COLLATERAL)["tcb_info"])


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"{}",
        b"\xff",
        b"{" * 100,
        bytes((1 << 20) + 1),
        *(_changed(TDX_COLLATERAL, **{name: None}) for name in json.loads(TDX_COLLATERAL) if "signature" not in name),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"fmspc": "B0C06F00000"})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"fmspc": "B0C06F0000"})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"id": ["TDX"]})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"id": "SEV"})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"nextUpdate": "soon"})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"nextUpdate": "2025-07-19T10:16:03"})),
        _changed(TDX_COLLATERAL, tcb_info=json.dumps(TCB_INFO | {"nextUpdate": "9999-12-31T23:59:59-23:59"})),
        _changed(TDX_COLLATERAL, tcb_info=json.loads(TDX_COLLATERAL)["tcb_info"][:-1]),
        _changed(TDX_COLLATERAL, pck_crl="00"),
        _changed(TDX_COLLATERAL, pck_crl=json.loads(TDX_COLLATERAL)["root_ca_crl"]),
        _changed(TDX_COLLATERAL, root_ca_crl="zz"),
        _changed(TDX_COLLATERAL, pck_crl_issuer_chain="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"),
    ],
)
def test_malformed_collateral(broken: bytes) -> None:
    with pytest.raises(FormatError, match="collateral"):
        parse_collateral(broken, "the collateral")


def test_what_a_policy_asks_must_hold() -> None:
    mrtd = TDX[48 + 136 : 48 + 184]
    good = EvidencePolicy(measurements=(mrtd,), report_data=TDX[48 + 520 : 48 + 584], rtmrs={3: (bytes(48),)})
    assert judge(TDX, TDX_COLLATERAL, good).accepted
    for bad, code in (
        (EvidencePolicy(measurements=(bytes(48),)), "measurement"),
        (EvidencePolicy(report_data=b"x"), "report-data"),
        (EvidencePolicy(rtmrs={0: (bytes(48),)}), "rtmr"),
        (EvidencePolicy(rtmrs={4: (bytes(48),)}), "rtmr"),
        (EvidencePolicy(host_data=(b"\1" * 48,)), "host-data"),
        (EvidencePolicy(signers=(bytes(32),)), "signer"),
        (EvidencePolicy(min_svn=1), "svn"),
        (EvidencePolicy(pcrs={7: (bytes(32),)}), "pcr"),
        (EvidencePolicy(nonce="x"), "nonce"),
    ):
        assert judge(TDX, TDX_COLLATERAL, bad).codes == (code,)


@settings(max_examples=150)
@given(offset=st.integers(0, 48 + 584 - 1), bit=st.integers(0, 7))
def test_no_bit_of_the_signed_part_can_be_changed(offset: int, bit: int) -> None:
    changed = bytearray(TDX)
    changed[offset] ^= 1 << bit
    try:
        verdict = judge(bytes(changed), policy=LENIENT)
    except FormatError:
        return
    assert not verdict.accepted
    if offset >= 48:
        assert "signature" in verdict.codes


@settings(max_examples=100)
@given(size=st.integers(0, 4000))
def test_truncated_quotes_are_refused(size: int) -> None:
    with pytest.raises(FormatError):
        judge(TDX[:size], policy=LENIENT)


def test_an_oversized_length_is_refused() -> None:
    changed = bytearray(TDX)
    struct.pack_into("<I", changed, 48 + 584, 0xFFFFFFFF)
    with pytest.raises(FormatError, match="cut short"):
        judge(bytes(changed))
    with pytest.raises(FormatError, match="more than"):
        judge(TDX + bytes(64 << 10))


def test_the_broker_protocols_form() -> None:
    for tee, kind, quote in (("tdx", EvidenceKind.TDX, TDX), ("sgx", EvidenceKind.SGX, SGX)):
        evidence = Evidence(kind, quote)
        assert from_kbs_evidence(tee, to_kbs_evidence(evidence)) == evidence


def test_a_certificate_that_cannot_be_read_is_a_refusal() -> None:
    chain = TDX.index(b"-----BEGIN CERTIFICATE-----")
    pem = TDX[chain : TDX.index(b"-----END CERTIFICATE-----")]
    der = base64.b64decode(b"".join(pem.split(b"\n")[1:]))
    # The version, and the curve of the platform's key.
    for known, unknown in (("a003020102", "a003020104"), ("06082a8648ce3d030107", "06082a8648ce3d03017e")):
        changed = base64.b64encode(der.replace(bytes.fromhex(known), bytes.fromhex(unknown), 1))
        lines = b"\n".join(changed[at : at + 64] for at in range(0, len(changed), 64))
        quote = TDX.replace(pem, b"-----BEGIN CERTIFICATE-----\n" + lines + b"\n")
        assert len(quote) == len(TDX)
        assert judge(quote, policy=LENIENT).codes == ("chain",)


@pytest.mark.parametrize("bit", range(8))
def test_whatever_lets_the_host_look_into_a_trust_domain_is_debugging(bit: int) -> None:
    changed = bytearray(TDX)
    changed[48 + 120] |= 1 << bit
    assert "debug" in judge(bytes(changed), policy=LENIENT).codes


@pytest.mark.parametrize("offset", [64, 112])
def test_a_module_that_is_not_intels(offset: int) -> None:
    changed = bytearray(TDX)
    changed[48 + offset] |= 1
    assert judge(bytes(changed), policy=LENIENT).codes == ("signature", "chain")
