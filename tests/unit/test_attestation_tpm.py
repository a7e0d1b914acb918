"""TPM quotes: a genuine one of an enrolled key verifies, others are refused for their reason. Sample evidence."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.kbs import from_kbs_evidence, to_kbs_evidence
from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor
from encfs.attestation.verdict import Verdict
from encfs.attestation.verify import verify_evidence
from encfs.errors import FormatError

GENUINE = json.loads((Path(__file__).parents[2] / "fixtures" / "evidence" / "tpm" / "evidence.json").read_text())
NOW = datetime(2025, 6, 20, tzinfo=UTC)
AK = base64.b64decode(GENUINE["ak_public"])
MESSAGE = base64.b64decode(GENUINE["tpm_quote"]["message"])
# Magic, type, the signer's name (34 bytes) before it; length of its own.
QUALIFYING = MESSAGE[44:108]
PCR17 = b"\xff" * 32
ENROLLED = EvidencePolicy(attestation_keys=(AK,))
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def judge(document: dict[str, Any], policy: EvidencePolicy = ENROLLED) -> Verdict:
    return verify_evidence(json.dumps(document).encode(), policy, now=NOW)


def changed(**members: object) -> dict[str, Any]:
    """The genuine evidence with other members of its quote."""
    return GENUINE | {"tpm_quote": GENUINE["tpm_quote"] | members}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def spki(key: Any) -> bytes:
    content = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(content, bytes)
    return content


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


PCRS = [bytes([index]) * 32 for index in range(24)]


def statement(
    extra: bytes = b"x" * 32,
    *,
    magic: int = 0xFF544347,
    kind: int = 0x8018,
    bank: int = 0x000B,
    banks: int = 1,
    bitmap: bytes = b"\x80\x01\x00",  # 7 and 8
    digest: bytes | None = None,
    algorithm: str = "sha256",
) -> bytes:
    quoted = hashlib.new(algorithm, PCRS[7] + PCRS[8]).digest() if digest is None else digest
    head = struct.pack(">IH", magic, kind) + sized(b"name") + sized(extra) + struct.pack(">QIIBQ", 5, 1, 2, 1, 3)
    selection = (struct.pack(">HB", bank, len(bitmap)) + bitmap) * banks
    # The length of a bitmap is one byte, not two.
    return head + struct.pack(">I", banks) + selection + sized(quoted)


def rsassa(message: bytes, key: rsa.RSAPrivateKey = RSA_KEY, digest: HashAlgorithm | None = None) -> bytes:
    return struct.pack(">HH", 0x0014, 0x000B) + sized(key.sign(message, padding.PKCS1v15(), digest or SHA256()))


def ecdsa(message: bytes, key: ec.EllipticCurvePrivateKey = EC_KEY, *, sha384: bool = False) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA384() if sha384 else SHA256())))
    size = (key.key_size + 7) // 8
    return struct.pack(">HH", 0x0018, 0x000C if sha384 else 0x000B) + sized(r.to_bytes(size)) + sized(s.to_bytes(size))


def quoted(
    message: bytes, sign: Callable[[bytes], bytes] = rsassa, key: Any = RSA_KEY, pcrs: list[bytes] | None = None
) -> dict[str, Any]:
    values = [value.hex() for value in pcrs or PCRS]
    quote = {"message": b64(message), "signature": b64(sign(message)), "pcrs": values}
    return {"ak_public": b64(spki(key)), "tpm_quote": quote}


OWN = EvidencePolicy(attestation_keys=(spki(RSA_KEY), spki(EC_KEY)))


def test_a_genuine_quote_verifies() -> None:
    verdict = judge(GENUINE)
    assert verdict.accepted
    assert verdict.kind == "tpm"
    assert verdict.claims["attestation_key"] == hashlib.sha256(AK).hexdigest()
    assert verdict.claims["pcrs"] == {str(index): value for index, value in enumerate(GENUINE["tpm_quote"]["pcrs"])}
    assert {reason.code for reason in verdict.unchecked} == {"pcr", "report-data"}


def test_the_key_must_be_enrolled() -> None:
    assert judge(GENUINE, EvidencePolicy()).codes == ("missing",)
    assert judge(GENUINE, EvidencePolicy(attestation_keys=(spki(RSA_KEY),))).codes == ("attestation-key",)
    # A key of one's own signs anything, and is not the enrolled one; the enrolled one did not sign this.
    forged = quoted(statement())
    assert judge(forged).codes == ("attestation-key",)
    assert judge(forged | {"ak_public": GENUINE["ak_public"]}).codes == ("signature",)


def test_what_a_policy_asks_must_hold() -> None:
    good = EvidencePolicy(attestation_keys=(AK,), report_data=QUALIFYING, pcrs={0: (bytes(32),), 17: (b"x", PCR17)})
    verdict = judge(GENUINE, good)
    assert verdict.accepted
    assert verdict.unchecked == ()
    for bad, code in (
        ({"pcrs": {17: (bytes(32),)}}, "pcr"),
        ({"pcrs": {17: ()}}, "pcr"),
        ({"pcrs": {24: (bytes(32),)}}, "pcr"),
        ({"report_data": QUALIFYING[:47]}, "report-data"),
        ({"report_data": QUALIFYING + b"\0"}, "report-data"),
        ({"measurements": (bytes(48),)}, "measurement"),
        ({"signers": (bytes(48),)}, "signer"),
        ({"product_ids": (0,)}, "product"),
        ({"min_svn": 1}, "svn"),
        ({"host_data": (bytes(32),)}, "host-data"),
        ({"chip_ids": (bytes(64),)}, "chip"),
        ({"tcb_floors": (SnpTcbFloor(),)}, "tcb"),
        ({"rtmrs": {0: (bytes(48),)}}, "rtmr"),
        ({"nonce": ""}, "nonce"),
        ({"issuers": ("x",)}, "issuer"),
        ({"claims": {"clock_safe": (1,)}}, "claim"),
    ):
        assert judge(GENUINE, EvidencePolicy(attestation_keys=(AK,), **bad)).codes == (code,)  # type: ignore[arg-type]


def test_report_data_may_be_cut_to_32_bytes_and_is_padded() -> None:
    def accepted(extra: bytes, expected: bytes) -> bool:
        policy = EvidencePolicy(attestation_keys=OWN.attestation_keys, report_data=expected)
        return judge(quoted(statement(extra)), policy).accepted

    digest = bytes(range(48))
    assert accepted(digest, digest)
    assert accepted(digest[:32], digest)
    assert accepted(digest + bytes(16), digest)
    assert accepted(b"short".ljust(32, b"\0"), b"short")
    assert not accepted(digest[:31], digest)
    assert not accepted(digest[:33], digest)
    assert not accepted(b"", digest)
    assert not accepted(digest[:32], digest + bytes(17))
    assert not accepted(digest + b"\1", digest)


@pytest.mark.parametrize("sign", [rsassa, ecdsa])
def test_every_supported_signature_verifies(sign: Callable[[bytes], bytes]) -> None:
    key = RSA_KEY if sign is rsassa else EC_KEY
    verdict = judge(quoted(statement(), sign, key), OWN)
    assert verdict.accepted
    assert verdict.claims["pcrs"] == {"7": "07" * 32, "8": "08" * 32}


def test_the_digest_has_the_hash_of_the_signature() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    policy = EvidencePolicy(attestation_keys=(spki(key),))
    for algorithm, codes in (("sha384", ()), ("sha256", ("pcr",))):
        document = quoted(statement(algorithm=algorithm), lambda text: ecdsa(text, key, sha384=True), key)
        assert judge(document, policy).codes == codes


def test_what_was_signed_must_be_a_quote_of_a_tpm() -> None:
    assert judge(quoted(statement(magic=0xFF544346)), OWN).codes[0] == "signature"
    # TPM_ST_ATTEST_CREATION
    assert judge(quoted(statement(kind=0x801A)), OWN).codes[0] == "unsupported"


def test_pcr_values_must_be_those_that_were_signed() -> None:
    other = [*PCRS]
    other[8] = bytes(32)
    assert judge(quoted(statement(), pcrs=other), OWN).codes == ("pcr",)
    # Values that the quote does not cover are nobody's word: not claimed, and no policy is met by them.
    other = [*PCRS]
    other[9] = bytes(32)
    verdict = judge(quoted(statement(), pcrs=other), OWN)
    assert verdict.accepted
    assert "9" not in verdict.claims["pcrs"]  # type: ignore[operator]
    asking = EvidencePolicy(attestation_keys=OWN.attestation_keys, pcrs={9: (bytes(32),)})
    assert judge(quoted(statement(), pcrs=other), asking).codes == ("pcr",)
    # A quote about nothing.
    nothing = statement(bitmap=bytes(3), digest=hashlib.sha256(b"").digest())
    assert judge(
        quoted(nothing), EvidencePolicy(attestation_keys=OWN.attestation_keys, pcrs={7: (PCRS[7],)})
    ).codes == ("pcr",)


def test_other_banks_are_refused() -> None:
    for bank in (0x0004, 0x000C):
        assert judge(quoted(statement(bank=bank)), OWN).codes == ("pcr",)
    assert judge(quoted(statement(banks=2)), OWN).codes == ("pcr",)
    assert judge(quoted(statement(banks=0)), OWN).codes == ("pcr",)


def test_weak_and_foreign_algorithms_are_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505
    document = quoted(statement(), lambda text: rsassa(text, weak), weak)
    assert judge(document, EvidencePolicy(attestation_keys=(spki(weak),))).codes == ("algorithm",)
    curve = ec.generate_private_key(ec.SECP256K1())
    document = quoted(statement(), lambda text: ecdsa(text, curve), curve)
    assert judge(document, EvidencePolicy(attestation_keys=(spki(curve),))).codes == ("algorithm",)
    genuine = rsassa(statement())
    for head in ("00140004", "0016000b", "0010000b", "0005000b"):  # SHA-1, RSAPSS, none, HMAC
        document = quoted(statement(), lambda _, head=head: bytes.fromhex(head) + genuine[4:])  # type: ignore[misc]
        assert judge(document, OWN).codes == ("algorithm",)
    # A signature of the other kind of key.
    assert judge(quoted(statement(), rsassa, EC_KEY), OWN).codes == ("algorithm",)
    assert judge(quoted(statement(), ecdsa, RSA_KEY), OWN).codes == ("algorithm",)
    # The right form, and the wrong hash.
    assert judge(quoted(statement(), lambda text: rsassa(text, digest=SHA384())), OWN).codes == ("signature",)


@settings(max_examples=200)
@given(offset=st.integers(0, len(MESSAGE) - 1), bit=st.integers(0, 7))
def test_no_bit_of_the_statement_can_be_changed(offset: int, bit: int) -> None:
    altered = bytearray(MESSAGE)
    altered[offset] ^= 1 << bit
    try:
        verdict = judge(changed(message=b64(bytes(altered))))
    except FormatError:
        return
    assert "signature" in verdict.codes


@settings(max_examples=100)
@given(size=st.integers(0, len(MESSAGE) - 1))
def test_truncated_statements_and_signatures_are_refused(size: int) -> None:
    with pytest.raises(FormatError, match="cut short"):
        judge(changed(message=b64(MESSAGE[:size])))
    signature = base64.b64decode(GENUINE["tpm_quote"]["signature"])
    with pytest.raises(FormatError, match="cut short"):
        judge(changed(signature=b64(signature[:size])))


def test_malformed_parts_are_refused() -> None:
    pcrs = GENUINE["tpm_quote"]["pcrs"]
    signature = base64.b64decode(GENUINE["tpm_quote"]["signature"])
    ed = ed25519.Ed25519PrivateKey.generate()
    for document, match in (
        (changed(message=b64(MESSAGE + b"\0")), "1 bytes too many"),
        (changed(signature=b64(signature + b"\0")), "1 bytes too many"),
        (changed(message=7), "not canonical base64"),
        (changed(message="!"), "base64"),
        (changed(signature=None), "base64"),
        (changed(pcrs=pcrs[:23]), "list of 24"),
        (changed(pcrs=[*pcrs, pcrs[0]]), "list of 24"),
        (changed(pcrs="".join(pcrs)), "list of 24"),
        (changed(pcrs=[*pcrs[:23], pcrs[17].upper()]), "lower-case"),
        (changed(pcrs=[*pcrs[:23], "00" * 20]), "32 bytes"),
        (changed(pcrs=[*pcrs[:23], 0]), "32 bytes"),
        (GENUINE | {"tpm_quote": "x"}, "not a JSON object"),
        (GENUINE | {"ak_public": b64(AK[:-1])}, "no public key"),
        (GENUINE | {"ak_public": ""}, "no public key"),
        (GENUINE | {"ak_public": b64(spki(ed))}, "neither an RSA key"),
        (quoted(statement(bitmap=b"\0\0\0\1")), "beyond the 24"),
        (quoted(statement(banks=5)), "too many banks"),
    ):
        with pytest.raises(FormatError, match=match):
            judge(document, OWN)
    with pytest.raises(FormatError, match="more than"):
        judge(GENUINE | {"padding": "x" * (1 << 20)})


def test_the_broker_protocols_form() -> None:
    evidence = from_kbs_evidence("tpm", GENUINE)
    assert evidence.kind is EvidenceKind.TPM
    assert to_kbs_evidence(evidence) == GENUINE
    assert verify_evidence(evidence, ENROLLED, now=NOW).accepted
    with pytest.raises(FormatError, match="not of snp"):
        from_kbs_evidence("snp", GENUINE)


# -- sample

DIGEST = bytes(range(48))
SAMPLE = {"svn": "1", "report_data": b64(DIGEST)}
DEMO = frozenset({EvidenceKind.SAMPLE})


def test_sample_evidence_is_refused_unless_asked_for() -> None:
    assert judge(SAMPLE, EvidencePolicy()).codes == ("sample",)
    assert judge(SAMPLE, EvidencePolicy(report_data=DIGEST)).codes == ("sample",)
    verdict = judge(SAMPLE, EvidencePolicy(kinds=DEMO, report_data=DIGEST))
    assert verdict.accepted
    assert [reason.code for reason in verdict.unchecked] == ["sample"]


def test_sample_evidence_carries_fresh_data_and_nothing_else() -> None:
    for expected in (DIGEST[:-1] + b"x", DIGEST + b"x", b"x"):
        assert judge(SAMPLE, EvidencePolicy(kinds=DEMO, report_data=expected)).codes == ("report-data",)
    for asked, code in (({"measurements": (bytes(48),)}, "measurement"), ({"pcrs": {0: (bytes(32),)}}, "pcr")):
        policy = EvidencePolicy(kinds=DEMO, report_data=DIGEST, **asked)  # type: ignore[arg-type]
        assert judge(SAMPLE, policy).codes == (code,)


def test_malformed_sample_evidence_is_refused() -> None:
    for bad in (7, None, "!", b64(bytes(65))):
        with pytest.raises(FormatError, match="report_data"):
            judge(SAMPLE | {"report_data": bad}, EvidencePolicy(kinds=DEMO))
