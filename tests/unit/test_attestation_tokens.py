"""MAA and EAR tokens: claims as recorded from the services, under keys made here; each way to forge one is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor
from encfs.attestation.tokens import trusted_keys
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import recognise, verify_evidence
from encfs.errors import FormatError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "evidence"
MAA = json.loads((FIXTURES / "maa" / "token-claims.json").read_text())
EAR = json.loads((FIXTURES / "kbs" / "ear-token-example.json").read_text())
AFFIRMED = EAR | {"submods": {"cpu0": EAR["submods"]["cpu0"] | {"ear.status": "affirming"}}}
ISSUER = MAA["iss"]
NOW = datetime.fromtimestamp(MAA["iat"] + 60, UTC)
EAR_NOW = datetime.fromtimestamp(EAR["iat"] + 60, UTC)
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def spki(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def rs256(data: bytes) -> bytes:
    return RSA_KEY.sign(data, padding.PKCS1v15(), hashes.SHA256())


def es256(data: bytes) -> bytes:
    r, s = decode_dss_signature(EC_KEY.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


def token(
    claims: dict[str, Any], sign: Callable[[bytes], bytes] = rs256, alg: str = "RS256", **header: object
) -> bytes:
    head = b64(json.dumps({"alg": alg, "jku": f"{ISSUER}/certs", "kid": "x", "typ": "JWT", **header}).encode())
    signed = f"{head}.{b64(json.dumps(claims).encode())}".encode()
    return signed + b"." + b64(sign(signed)).encode()


MAA_POLICY = EvidencePolicy(token_keys=(spki(RSA_KEY),), issuers=(ISSUER,))
EAR_POLICY = EvidencePolicy(token_keys=(spki(EC_KEY),), report_data=b"test")


def judge(content: bytes, policy: EvidencePolicy = MAA_POLICY, now: datetime = NOW) -> Verdict:
    return verify_evidence(content, policy, now=now)


def isolated(**members: object) -> dict[str, Any]:
    return MAA | {"x-ms-isolation-tee": MAA["x-ms-isolation-tee"] | members}


def ear(claims: dict[str, Any] = AFFIRMED, policy: EvidencePolicy = EAR_POLICY) -> Verdict:
    return judge(token(claims, es256, "ES256"), policy, EAR_NOW)


def test_a_token_of_a_virtual_machine() -> None:
    content = token(MAA)
    assert recognise(content) is EvidenceKind.MAA
    verdict = judge(content)
    assert verdict.codes == ()
    assert verdict.claims["measurement"] == MAA["x-ms-isolation-tee"]["x-ms-sevsnpvm-launchmeasurement"]
    assert verdict.claims["debug"] is False
    # A container's has the same at the top.
    flat = {"iss": ISSUER, "exp": MAA["exp"], "x-ms-ver": "1.0", **MAA["x-ms-isolation-tee"]}
    assert judge(token(flat | {"x-ms-compliance-status": "azure-compliant-uvm"})).codes == ()


MEASUREMENT = bytes.fromhex(MAA["x-ms-isolation-tee"]["x-ms-sevsnpvm-launchmeasurement"])


@pytest.mark.parametrize(
    ("changes", "codes"),
    [
        ({"measurements": (MEASUREMENT,), "tcb_floors": (SnpTcbFloor(microcode=55),)}, ()),
        ({"measurements": (bytes(48),)}, ("measurement",)),
        ({"tcb_floors": (SnpTcbFloor(microcode=56),)}, ("tcb",)),
        ({"tcb_floors": (SnpTcbFloor("Milan"),)}, ("tcb",)),
        ({"min_svn": 2}, ("svn",)),
        ({"host_data": (bytes([1]) * 32,)}, ("host-data",)),
        ({"signers": (bytes(48),)}, ("signer",)),
        ({"nonce": "fresh"}, ("nonce",)),
        ({"report_data": b"fresh"}, ("report-data",)),
        ({"issuers": ("https://other.attest.azure.net",)}, ("issuer",)),
        ({"issuers": ()}, ("issuer",)),
        ({"token_keys": ()}, ("missing",)),
        ({"token_keys": (spki(EC_KEY),)}, ("signature",)),
        ({"pcrs": {4: (bytes(32),)}}, ("pcr",)),
        ({"chip_ids": (bytes(64),)}, ("chip",)),
    ],
)
def test_what_a_policy_asks_of_maa(changes: dict[str, Any], codes: tuple[str, ...]) -> None:
    assert judge(token(MAA), replace(MAA_POLICY, **changes)).codes == codes


@pytest.mark.parametrize(
    ("claims", "codes"),
    [
        (isolated(**{"x-ms-sevsnpvm-is-debuggable": True}), ("debug",)),
        (isolated(**{"x-ms-sevsnpvm-migration-allowed": True}), ("migration",)),
        (isolated(**{"x-ms-sevsnpvm-vmpl": 1}), ("vmpl",)),
        (isolated(**{"x-ms-compliance-status": "none"}), ("status",)),
        (isolated(**{"x-ms-attestation-type": "azurevm"}), ("unsupported",)),
        ({key: value for key, value in MAA.items() if key != "exp"}, ("expired",)),
        (MAA | {"exp": MAA["iat"] - 10}, ("expired",)),
        (MAA | {"nbf": MAA["iat"] + 600}, ("expired",)),
        (MAA | {"exp": "tomorrow"}, ("expired",)),
        (MAA | {"iss": 5}, ("issuer",)),
    ],
)
def test_what_a_token_must_say(claims: dict[str, Any], codes: tuple[str, ...]) -> None:
    assert judge(token(claims)).codes == codes


def test_clocks_may_be_a_minute_apart() -> None:
    end = datetime.fromtimestamp(MAA["exp"], UTC)
    assert judge(token(MAA), now=end + timedelta(seconds=59)).codes == ()
    assert judge(token(MAA), now=end + timedelta(seconds=61)).codes == ("expired",)


def test_nonces() -> None:
    policy = replace(MAA_POLICY, nonce="fresh")
    assert judge(token(MAA | {"nonce": "fresh"}), policy).codes == ()
    assert ear(AFFIRMED | {"eat_nonce": ["a", "fresh"]}, replace(EAR_POLICY, nonce="fresh")).codes == ()
    assert ear(AFFIRMED, replace(EAR_POLICY, nonce="fresh")).codes == ("nonce",)


def test_forged_signatures() -> None:
    # With the public key as the secret, unsigned, with another key of the right kind in the header.
    def hs256(data: bytes) -> bytes:
        mac = hmac.HMAC(spki(RSA_KEY), hashes.SHA256())
        mac.update(data)
        return mac.finalize()

    assert judge(token(MAA, hs256, "HS256")).codes == ("algorithm",)
    assert judge(token(MAA, lambda _: b"", "none")).codes == ("algorithm",)
    assert judge(token(MAA, lambda _: b"x", "None")).codes == ("algorithm",)
    assert judge(token(MAA, rs256, "PS256")).codes == ("signature",)
    assert judge(token(MAA, rs256, "ES256")).codes == ("signature",)
    assert judge(token(MAA, rs256, "RS256", crit=["b64"])).codes == ("unsupported",)
    other = ec.generate_private_key(ec.SECP256R1())
    numbers = other.public_key().public_numbers()
    jwk = {"kty": "EC", "crv": "P-256", "x": b64(numbers.x.to_bytes(32)), "y": b64(numbers.y.to_bytes(32))}

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(other.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)

    forged = token(AFFIRMED, sign, "ES256", jwk=jwk, x5c=[certificate_text(certified(other))])
    assert judge(forged, EAR_POLICY, EAR_NOW).codes == ("signature",)


SIGNED = token(MAA)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SIGNED) - 1), st.sampled_from("ABCDwxyz0189-_."))
def test_every_character_counts(at: int, character: str) -> None:
    changed = SIGNED[:at] + character.encode() + SIGNED[at + 1 :]
    if changed == SIGNED:
        return
    try:
        assert judge(changed).accepted is False
    except FormatError:
        return


def certified(
    key: Any,
    issuer: tuple[Any, x509.Certificate] | None = None,
    *,
    authority: bool = False,
    days: int = 365,
    path_length: int | None = None,
    usage: x509.KeyUsage | None = None,
) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {x509.random_serial_number()}")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer[1].subject if issuer else name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(EAR_NOW - timedelta(days=1))
        .not_valid_after(EAR_NOW + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=path_length), critical=True)
    )
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(issuer[0] if issuer else key, hashes.SHA256())


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def certificate_text(certificate: x509.Certificate) -> str:
    return base64.b64encode(der(certificate)).decode()


def test_certificates_in_the_token() -> None:
    root_key, middle_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certified(root_key, authority=True)
    middle = certified(middle_key, (root_key, root), authority=True)
    leaf = certified(EC_KEY, (middle_key, middle))
    policy = replace(EAR_POLICY, token_keys=(), token_authorities=(der(root),))

    def codes(*chain: x509.Certificate, policy: EvidencePolicy = policy) -> tuple[str, ...]:
        x5c = [certificate_text(one) for one in chain]
        return judge(token(AFFIRMED, es256, "ES256", x5c=x5c), policy, EAR_NOW).codes

    assert codes(leaf, middle) == codes(leaf, middle, root) == ()
    assert codes(certified(EC_KEY), policy=replace(policy, token_authorities=())) == ("missing",)
    refused = ("chain", "signature")
    assert codes(leaf) == refused
    assert codes(certified(EC_KEY)) == refused
    # A certificate that is no authority issues nothing; one that has expired neither.
    plain = certified(middle_key, (root_key, root))
    assert codes(certified(EC_KEY, (middle_key, plain)), plain) == refused
    assert codes(certified(EC_KEY, (root_key, root), days=0)) == ()
    # One that may issue no further authorities, or not sign certificates.
    last = certified(middle_key, (root_key, root), authority=True, path_length=0)
    under = certified(root_key, (middle_key, last), authority=True)
    assert codes(certified(EC_KEY, (middle_key, last)), last) == ()
    assert codes(certified(EC_KEY, (root_key, under)), under, last) == refused
    no_signing = x509.KeyUsage(*[True, *[False] * 8])
    odd = certified(middle_key, (root_key, root), authority=True, usage=no_signing)
    assert codes(certified(EC_KEY, (middle_key, odd)), odd) == refused
    unread = base64.b64encode(der(leaf).replace(bytes.fromhex("a003020102"), bytes.fromhex("a003020104"), 1)).decode()
    assert judge(token(AFFIRMED, es256, "ES256", x5c=[unread]), policy, EAR_NOW).codes == refused
    late = certified(EC_KEY, (root_key, root))
    content = token(AFFIRMED | {"exp": EAR["exp"] + 10**9}, es256, "ES256", x5c=[certificate_text(late)])
    assert judge(content, policy, EAR_NOW + timedelta(days=400)).codes == refused
    assert judge(token(AFFIRMED, es256, "ES256", x5c=["!"]), policy, EAR_NOW).codes == refused
    assert judge(token(AFFIRMED, es256, "ES256", x5c=[]), policy, EAR_NOW).codes == refused


def test_an_ear_token() -> None:
    assert recognise(token(EAR, es256, "ES256")) is EvidenceKind.EAR
    verdict = ear()
    assert verdict.codes == ()
    assert (
        verdict.claims["measurement"]
        == EAR["submods"]["cpu0"]["ear.veraison.annotated-evidence"]["sgx"]["body"]["mr_enclave"]
    )
    assert ear(EAR).codes == ("status",)
    good = bytes.fromhex(str(verdict.claims["measurement"]))
    assert ear(policy=replace(EAR_POLICY, measurements=(good,))).codes == ()
    assert ear(policy=replace(EAR_POLICY, measurements=(bytes(32),))).codes == ("measurement",)
    assert ear(policy=replace(EAR_POLICY, report_data=b"other")).codes == ("report-data",)
    assert ear(policy=replace(EAR_POLICY, issuers=("https://as",))).codes == ("issuer",)
    assert ear(policy=replace(EAR_POLICY, host_data=(bytes(32),))).codes == ("host-data",)
    for status in (True, None, "none", "warning", 32, 96, "affirming "):
        parts = {**AFFIRMED["submods"], "gpu0": {"ear.status": status}}
        assert ear(AFFIRMED | {"submods": parts}).codes == ("status",)
    for parts in ({}, [], "x"):
        with pytest.raises(FormatError):
            ear(AFFIRMED | {"submods": parts})


def test_files_of_keys() -> None:
    numbers = RSA_KEY.public_key().public_numbers()
    n, e = b64(numbers.n.to_bytes(256)), b64(numbers.e.to_bytes(3))
    own = x509.load_der_x509_certificate(der(certified(RSA_KEY)))
    # As ISSUER/certs answers: certificates, and no numbers.
    microsoft = {"keys": [{"kid": "x/+=", "kty": "RSA", "x5c": [certificate_text(own)]}]}
    for content in (
        json.dumps(microsoft).encode(),
        json.dumps({"keys": [{"kty": "RSA", "n": n, "e": e}]}).encode(),
        own.public_bytes(Encoding.PEM),
        der(own),
        RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        assert trusted_keys(content, "keys") == (spki(RSA_KEY),)
    small = rsa.generate_private_key(65537, 1024)  # noqa: S505 -- to be refused
    for content in (
        b"",
        b"{}",
        b'{"keys": []}',
        b'{"keys": [5]}',
        b'{"keys": [{"x5c": [5]}]}',
        b'{"keys": [{"x5c": ["AAAA"]}]}',
        b'{"keys": [{"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}]}',
        small.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    ):
        with pytest.raises(FormatError):
            trusted_keys(content, "keys")


def test_malformed_tokens() -> None:
    for members in ({"x-ms-sevsnpvm-vmpl": "0"}, {"x-ms-sevsnpvm-is-debuggable": 0}, {"x-ms-sevsnpvm-hostdata": "x"}):
        with pytest.raises(FormatError):
            judge(token(isolated(**members)))


def test_a_token_about_tdx() -> None:
    tdx = {
        "x-ms-attestation-type": "tdxvm",
        "x-ms-compliance-status": "azure-compliant-cvm",
        "attester_tcb_status": "UpToDate",
        "tdx_td_attributes": "0000001000000000",
        **dict.fromkeys(("tdx_mrtd", "tdx_mrconfigid", *(f"tdx_rtmr{index}" for index in range(4))), "11" * 48),
        "tdx_report_data": "22" * 64,
    }
    claims = {"iss": ISSUER, "exp": MAA["exp"], "x-ms-ver": "1.0", "x-ms-isolation-tee": tdx}
    good = replace(MAA_POLICY, measurements=(b"\x11" * 48,), rtmrs={1: (b"\x11" * 48,)}, report_data=b"\x22" * 64)
    assert judge(token(claims), good).codes == ()
    assert judge(token(claims), replace(good, rtmrs={1: (bytes(48),)})).codes == ("rtmr",)
    debug = claims | {"x-ms-isolation-tee": tdx | {"tdx_td_attributes": "0100001000000000"}}
    assert judge(token(debug), good).codes == ("debug",)
    moving = claims | {"x-ms-isolation-tee": tdx | {"tdx_td_attributes": "0000003000000000"}}
    assert judge(token(moving), good).codes == ("migration",)
    assert judge(token(moving), replace(good, allow_migration=True)).codes == ()
    with pytest.raises(FormatError):
        judge(token(claims | {"x-ms-isolation-tee": tdx | {"tdx_td_attributes": ""}}), good)
    old = claims | {"x-ms-isolation-tee": tdx | {"attester_tcb_status": "OutOfDate"}}
    assert judge(token(old), good).codes == ("tcb-status",)
