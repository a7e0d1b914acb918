"""TPM 2.0 quotes: structures (TPM 2.0 Library, Part 2) and their judgement. No TPM is needed, and none is asked.

A quote is trusted because its attestation key (AK) was enrolled: the policy names the AK's public half. That the AK
signs only what the TPM itself states (a restricted key) is the enrolment's to see to; a public key does not show it.
PCR values come beside the quote and are believed as far as the signed digest covers them.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, SHA512, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from encfs.attestation.cursor import Cursor
from encfs.attestation.evidence import MAX_EVIDENCE_SIZE
from encfs.attestation.findings import Findings, shorten
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Code
from encfs.encoding import b64_decode
from encfs.errors import FormatError
from encfs.strictjson import loads_object

AttestationKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

#: PCRs of a TPM for PCs.
PCR_COUNT = 24
_PCR_SIZE = 32
#: Bytes of report data that attesters of the KBS protocol put into a quote at least; longer data may be cut to them.
_QUALIFYING_SIZE = 32
_MAX_REPORT_DATA = 64
_MIN_RSA_BITS = 2048

# TPM_GENERATED_VALUE (6.2): an AK signs nothing from outside that begins with it. TPM_ST_ATTEST_QUOTE (6.9).
_GENERATED, _ATTEST_QUOTE = 0xFF544347, 0x8018
# TPM_ALG_ID (6.3).
_RSASSA, _ECDSA, _BANK_SHA256 = 0x0014, 0x0018, 0x000B
_HASHES: Mapping[int, type[HashAlgorithm]] = {0x000B: SHA256, 0x000C: SHA384, 0x000D: SHA512}
_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

_HEX_PCR = re.compile(rf"[0-9a-f]{{{2 * _PCR_SIZE}}}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Statement:
    """TPMS_ATTEST of a quote (10.12.12): who signs, data of the asker, clock, PCRs selected by bank, their digest."""

    magic: int
    kind: int
    qualified_signer: bytes
    extra_data: bytes
    clock: int
    resets: int
    restarts: int
    clock_safe: bool
    firmware: int
    #: Bank (TPM_ALG_ID) and its PCRs, ascending.
    selections: tuple[tuple[int, tuple[int, ...]], ...]
    pcr_digest: bytes


@dataclass(frozen=True, slots=True)
class Signature:
    """TPMT_SIGNATURE (11.3.4): scheme and hash (TPM_ALG_ID), and the form that `cryptography` verifies."""

    scheme: int
    hash: int
    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TpmQuote:
    """Evidence of the kind `tpm` in its parts."""

    #: DER SubjectPublicKeyInfo as it came.
    ak_public: bytes
    message: bytes = field(repr=False)
    signature: bytes = field(repr=False)
    #: 24 values of the SHA-256 bank.
    pcrs: tuple[bytes, ...] = field(repr=False)


def parse_tpm_evidence(content: bytes) -> TpmQuote:
    """The parts of evidence in the KBS protocol's form. Raises: FormatError."""
    document = loads_object(content, limit=MAX_EVIDENCE_SIZE, what="the evidence")
    quote = document.get("tpm_quote")
    if not isinstance(quote, dict):
        raise FormatError("tpm_quote of the evidence is not a JSON object")
    return TpmQuote(
        b64_decode(document.get("ak_public"), "ak_public"),
        b64_decode(quote.get("message"), "message of the TPM quote"),
        b64_decode(quote.get("signature"), "signature of the TPM quote"),
        parse_pcrs(quote.get("pcrs")),
    )


def parse_pcrs(value: object) -> tuple[bytes, ...]:
    """24 PCR values in lower-case hex. Raises: FormatError."""
    if not isinstance(value, list) or len(value) != PCR_COUNT:
        raise FormatError(f"pcrs of the TPM quote is not a list of {PCR_COUNT} values")
    if not all(isinstance(one, str) and _HEX_PCR.fullmatch(one) for one in value):
        raise FormatError("a PCR of the TPM quote is not 32 bytes in lower-case hex")
    return tuple(bytes.fromhex(one) for one in value)


def parse_statement(message: bytes) -> Statement:
    """A TPMS_ATTEST, whose magic and type may still be wrong; of a wrong type nothing behind the clock is read.

    Raises: FormatError where it is cut short, too long, or selects PCRs that no TPM for PCs has.
    """
    cursor = Cursor(message, "the TPM's statement", big_endian=True)
    magic, kind = cursor.number(4), cursor.number(2)
    signer, extra = cursor.sized(2), cursor.sized(2)
    clock, resets, restarts, safe = cursor.number(8), cursor.number(4), cursor.number(4), cursor.number(1)
    firmware = cursor.number(8)
    selections: list[tuple[int, tuple[int, ...]]] = []
    digest = b""
    if (magic, kind) == (_GENERATED, _ATTEST_QUOTE):
        count = cursor.number(4)
        if count > len(_HASHES) + 1:  # the banks that TPMs have: SHA-1 and these
            raise FormatError("the TPM's statement selects too many banks of PCRs")
        selections = [(cursor.number(2), _indices(cursor.sized(1))) for _ in range(count)]
        digest = cursor.sized(2)
        cursor.end()
    return Statement(
        magic, kind, signer, extra, clock, resets, restarts, bool(safe), firmware, tuple(selections), digest
    )


def _indices(bitmap: bytes) -> tuple[int, ...]:
    bits = int.from_bytes(bitmap, "little")
    if bits >> PCR_COUNT:
        raise FormatError(f"the TPM's statement selects a PCR beyond the {PCR_COUNT} of a PC")
    return tuple(index for index in range(PCR_COUNT) if bits >> index & 1)


def parse_signature(data: bytes) -> Signature | str:
    """A TPMT_SIGNATURE, or what of it is not supported. Raises: FormatError where it is cut short or too long."""
    cursor = Cursor(data, "the TPM's signature", big_endian=True)
    scheme, digest = cursor.number(2), cursor.number(2)
    if digest not in _HASHES:
        return f"the TPM's signature has the hash {digest:#06x}, which is not supported"
    if scheme == _RSASSA:
        value = cursor.sized(2)
    elif scheme == _ECDSA:
        r, s = cursor.sized(2), cursor.sized(2)
        value = encode_dss_signature(int.from_bytes(r), int.from_bytes(s))
    else:
        return f"the TPM's signature has the scheme {scheme:#06x}; supported are RSASSA and ECDSA"
    cursor.end()
    return Signature(scheme, digest, value)


def check_tpm_quote(findings: Findings, quote: TpmQuote, policy: EvidencePolicy) -> None:
    """Key, signature, PCRs and fresh data. Raises: FormatError for malformed parts."""
    statement = parse_statement(quote.message)
    signature = parse_signature(quote.signature)
    key = load_attestation_key(quote.ak_public)
    _check_enrolled(findings, key, policy)
    check_statement(findings, statement, quote.message, signature, key)
    check_pcrs(findings, statement, signature, quote.pcrs, policy)
    check_qualifying_data(findings, statement.extra_data, policy.report_data)
    findings.require_nothing_else(policy, {"pcrs"})


def load_attestation_key(der: bytes) -> AttestationKey:
    """An AK's public key: RSA or NIST curve. Raises: FormatError where it is none."""
    try:
        key = load_der_public_key(der)
    except (ValueError, UnsupportedAlgorithm):
        raise FormatError("ak_public is no public key (SubjectPublicKeyInfo in DER)") from None
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise FormatError("ak_public is neither an RSA key nor one on a NIST curve")
    return key


def public_der(key: AttestationKey) -> bytes:
    """SubjectPublicKeyInfo, DER."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _check_enrolled(findings: Findings, key: AttestationKey, policy: EvidencePolicy) -> None:
    public = public_der(key)
    fingerprint = hashlib.sha256(public).digest()
    findings.claims["attestation_key"] = fingerprint.hex()
    if not policy.attestation_keys:
        findings.refuse(Code.MISSING, "the policy enrols no attestation key: anyone can make a key that signs quotes")
    elif public not in policy.attestation_keys:
        findings.refuse(Code.ATTESTATION_KEY, f"the attestation key (SHA-256 {shorten(fingerprint)}) is not enrolled")


def check_statement(
    findings: Findings, statement: Statement, message: bytes, signature: Signature | str, key: AttestationKey
) -> None:
    """That the statement is a quote that a TPM made, and `key` signed it."""
    findings.claims |= {
        "report_data": statement.extra_data.hex(),
        "firmware": f"{statement.firmware:016x}",
        "clock": statement.clock,
        "clock_safe": statement.clock_safe,
        "resets": statement.resets,
        "restarts": statement.restarts,
    }
    if statement.magic != _GENERATED:
        findings.refuse(Code.SIGNATURE, "what was signed was not made by a TPM (its first four bytes)")
    elif statement.kind != _ATTEST_QUOTE:
        findings.refuse(Code.UNSUPPORTED, f"the TPM's statement is of type {statement.kind:#06x}, no quote")
    if isinstance(signature, str):
        findings.refuse(Code.ALGORITHM, signature)
    elif (weak := _unfit(key, signature.scheme)) is not None:
        findings.refuse(Code.ALGORITHM, weak)
    elif not _verify(key, signature, message):
        findings.refuse(Code.SIGNATURE, "the quote is not signed by its attestation key")


def _unfit(key: AttestationKey, scheme: int) -> str | None:
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size < _MIN_RSA_BITS:
            return f"the attestation key has {key.key_size} bits, fewer than {_MIN_RSA_BITS}"
        return None if scheme == _RSASSA else "the quote's signature is not of its key's type (RSA)"
    if not isinstance(key.curve, _CURVES):
        return f"attestation keys on the curve {key.curve.name} are not supported"
    return None if scheme == _ECDSA else "the quote's signature is not of its key's type (ECC)"


def _verify(key: AttestationKey, signature: Signature, message: bytes) -> bool:
    algorithm = _HASHES[signature.hash]()
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature.value, message, padding.PKCS1v15(), algorithm)
        else:
            key.verify(signature.value, message, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True


def check_pcrs(
    findings: Findings,
    statement: Statement,
    signature: Signature | str,
    pcrs: Sequence[bytes],
    policy: EvidencePolicy,
) -> None:
    """That the values are those that were signed, and that the policy allows them."""
    if [bank for bank, _ in statement.selections] != [_BANK_SHA256]:
        findings.refuse(Code.PCR, "the quote is not about the SHA-256 bank of PCRs alone")
        return
    selected = {index: pcrs[index] for index in statement.selections[0][1]}
    if isinstance(signature, str):  # already refused; its hash is also that of the digest
        return
    digest = hashlib.new(_HASHES[signature.hash]().name, b"".join(selected.values())).digest()
    if not hmac.compare_digest(digest, statement.pcr_digest):
        findings.refuse(Code.PCR, "the PCR values are not those that the TPM signed")
        return
    findings.claims["pcrs"] = {str(index): value.hex() for index, value in selected.items()}
    for index, allowed in sorted(policy.pcrs.items()):
        if index not in selected:
            findings.refuse(Code.PCR, f"the quote does not cover PCR {index}, which the policy asks about")
        elif selected[index] not in allowed:
            findings.refuse(Code.PCR, f"PCR {index} is {shorten(selected[index])}, which the policy does not allow")
    if not policy.pcrs:
        findings.leave_unchecked(Code.PCR, "the policy does not say what was booted (PCRs)")


def check_qualifying_data(findings: Findings, extra: bytes, expected: bytes | None) -> None:
    """Fresh data in a quote: the expected, padded with zeros, or its first 32 bytes."""
    if expected is not None and len(extra) == _QUALIFYING_SIZE < len(expected) <= _MAX_REPORT_DATA:
        expected = expected[:_QUALIFYING_SIZE]
    findings.require_report_data(extra, expected)
