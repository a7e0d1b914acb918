"""Verify Intel SGX and TDX quotes: the chain of signatures to Intel's pinned root, then TCB status by the collateral.

The signatures are checked here, with reasons of their own. Collateral (TCB info, identity of the quoting enclave,
revocation lists) is judged by `dcap-qvl`, an optional package, which checks the whole quote once more. Without
collateral nobody knows whether the platform's firmware is current or its certificate revoked: such a quote is refused
unless the policy allows it. Of several, that counts which is of the platform that the quote's certificate names.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat import asn1
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from encfs.attestation.certificates import reading_certificates
from encfs.attestation.collateral import AUTHORITIES, FMSPC_SIZE
from encfs.attestation.cursor import Cursor
from encfs.attestation.evidence import Collateral, Endorsements, EvidenceKind, Platform
from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.quotes import SGX_BODY, SGX_FLAG_DEBUG, Quote, td_is_migratable
from encfs.attestation.verdict import Code
from encfs.errors import FormatError, UnsupportedError

_ECDSA_P256 = 2
# Certification data: the chain in PEM, and (from version 4 on) a wrapper around the quoting enclave's report.
_PEM_CHAIN, _QE_REPORT = 5, 6
_MAX_CHAIN = 4
_PCK_NAME = "Intel SGX PCK Certificate"
_SGX_EXTENSION, _FMSPC = (x509.ObjectIdentifier(f"1.2.840.113741.1.13.1{one}") for one in ("", ".4"))
_INTEL_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")

# Signers and products of Intel's quoting enclaves, as Intel's QE identities have them.
_QUOTING_ENCLAVES = {
    EvidenceKind.SGX: (bytes.fromhex("8c4f5775d796503e96137f77c68a829a0056ac8ded70140b081b094490c57bff"), 1),
    EvidenceKind.TDX: (bytes.fromhex("dc9e2a7c6f948f17474e34a7fc43ed030f7c1563f1babddf6340c82e0e54a8c5"), 2),
}


@dataclass(frozen=True, slots=True)
class _Signature:
    """The signature data of a quote, cut into its parts."""

    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    qe_authentication: bytes
    chain: bytes


@dataclass(frozen=True, slots=True)
class _PckKey:
    """The key of a PCK certificate that leads to the pinned root, and whose platform it is."""

    not_before: datetime
    not_after: datetime
    fmspc: bytes
    ca: str
    key: ec.EllipticCurvePublicKey = field(repr=False)


@asn1.sequence
class _Member:
    oid: x509.ObjectIdentifier
    value: asn1.TLV


@asn1.sequence
class _SgxExtension:
    """Intel, "SGX PCK Certificate and Certificate Revocation List Profile Specification", section 1.3.5."""

    ppid: _Member
    tcb: _Member
    pce_id: _Member
    fmspc: _Member
    sgx_type: _Member
    platform_instance: _Member | None
    configuration: _Member | None


def check_quote(
    findings: Findings, raw: bytes, quote: Quote, endorsements: Endorsements, policy: EvidencePolicy, now: datetime
) -> None:
    """Everything but the report data. Raises: UnsupportedError where `dcap-qvl` is needed and not installed."""
    _claim(findings, quote)
    pck = _check_signatures(findings, quote, now)
    if quote.debug and not policy.allow_debug:
        what = "enclave" if quote.kind is EvidenceKind.SGX else "trust domain"
        findings.refuse(Code.DEBUG, f"the {what} is in debug mode: its host can read its memory")
    if pck is not None:
        platform = Platform(quote.kind, pck.fmspc, pck.ca)
        findings.claims["fmspc"] = pck.fmspc.hex()
        _check_collateral(findings, raw, platform, endorsements, policy, now)
    if quote.kind is EvidenceKind.SGX:
        _check_enclave(findings, quote, policy)
    else:
        _check_domain(findings, quote, policy)
    findings.require_absent(Code.CHIP, "chip id", policy.chip_ids)
    findings.require_absent(Code.PCR, "PCRs", policy.pcrs)
    findings.require_absent(Code.NONCE, "nonce of a token", () if policy.nonce is None else (policy.nonce,))
    findings.require_absent(Code.ISSUER, "issuer", policy.issuers)
    findings.require_absent(Code.TCB, "SNP firmware versions", policy.tcb_floors)


def check_report_data(findings: Findings, quote: Quote, policy: EvidencePolicy) -> None:
    findings.require_report_data(quote.body["report_data"], policy.report_data)


def _claim(findings: Findings, quote: Quote) -> None:
    body = quote.body
    findings.claims |= {
        "version": quote.version,
        "debug": quote.debug,
        "report_data": body["report_data"].hex(),
    }
    if quote.kind is EvidenceKind.SGX:
        findings.claims |= {
            "measurement": body["mrenclave"].hex(),
            "signer": body["mrsigner"].hex(),
            "product_id": body["isv_prod_id"],
            "svn": body["isv_svn"],
            "host_data": body["config_id"].hex(),
            "attributes": body["attributes"].hex(),
            "tcb": body["cpu_svn"].hex(),
        }
        return
    findings.claims |= {
        "measurement": body["mrtd"].hex(),
        "host_data": body["mrconfigid"].hex(),
        "owner": body["mrowner"].hex(),
        "owner_config": body["mrownerconfig"].hex(),
        "rtmrs": {str(index): body[f"rtmr{index}"].hex() for index in range(4)},
        "mrseam": body["mrseam"].hex(),
        "mrsignerseam": body["mrsignerseam"].hex(),
        "attributes": body["td_attributes"].hex(),
        "xfam": body["xfam"].hex(),
        "migration": td_is_migratable(body["td_attributes"]),
        "tcb": body["tee_tcb_svn"].hex(),
    }
    if "mrservicetd" in body:
        findings.claims |= {"mrservicetd": body["mrservicetd"].hex()}


def _check_signatures(findings: Findings, quote: Quote, now: datetime) -> _PckKey | None:
    """PCK certificate -> quoting enclave -> attestation key -> quote. The platform's key where all of it holds."""
    if quote.attestation_key_type != _ECDSA_P256:
        findings.refuse(Code.ALGORITHM, f"attestation keys of type {quote.attestation_key_type} are not supported")
        return None
    if quote.vendor_id != _INTEL_VENDOR:
        findings.refuse(Code.CHAIN, "the quoting enclave is not of Intel's make")
        return None
    parts = _split(quote)
    if isinstance(parts, str):
        findings.refuse(Code.UNSUPPORTED, parts)
        return None
    pck = _pck_key(parts.chain)
    if isinstance(pck, str):
        findings.refuse(Code.CHAIN, pck)
        return None
    if not _verify(pck.key, parts.qe_signature, parts.qe_report):
        findings.refuse(Code.SIGNATURE, "the quoting enclave's report is not signed by the platform's key")
        return None
    enclave = SGX_BODY.read(parts.qe_report)
    bound = hashlib.sha256(parts.attestation_key + parts.qe_authentication).digest().ljust(64, b"\0")
    if not hmac.compare_digest(bound, enclave["report_data"]):
        findings.refuse(Code.SIGNATURE, "the attestation key is not the one that the quoting enclave vouches for")
        return None
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + parts.attestation_key)
    except ValueError:
        findings.refuse(Code.SIGNATURE, "the attestation key is not a point on its curve")
        return None
    if not _verify(key, parts.signature, quote.signed):
        findings.refuse(Code.SIGNATURE, "the quote is not signed by its attestation key")
        return None
    signer, product = _QUOTING_ENCLAVES[quote.kind]
    if enclave["mrsigner"] != signer or enclave["isv_prod_id"] != product or enclave["attributes"][0] & SGX_FLAG_DEBUG:
        # The platform's key signs for any enclave with the provisioning attribute, not for Intel's alone.
        findings.refuse(Code.CHAIN, "the quote was not made by Intel's quoting enclave")
        return None
    if not pck.not_before <= now <= pck.not_after:
        findings.refuse(
            Code.EXPIRED,
            f"the platform's certificate is valid from {pck.not_before:%Y-%m-%d} to {pck.not_after:%Y-%m-%d}",
        )
    return pck


def _split(quote: Quote) -> _Signature | str:
    cursor = Cursor(quote.signature_data, "the quote's signature", big_endian=False)
    signature, attestation_key = cursor.take(64), cursor.take(64)
    if quote.version >= 4:
        if (kind := cursor.number(2)) != _QE_REPORT:
            return f"certification data of type {kind} is not supported"
        cursor = Cursor(cursor.sized(4), "the quote's certification data", big_endian=False)
    qe_report, qe_signature = cursor.take(SGX_BODY.size), cursor.take(64)
    authentication = cursor.sized(2)
    if (kind := cursor.number(2)) != _PEM_CHAIN:
        return f"certification data of type {kind} is not supported: the quote must carry its certificates"
    return _Signature(signature, attestation_key, qe_report, qe_signature, authentication, cursor.sized(4))


def _verify(key: ec.EllipticCurvePublicKey, signature: bytes, data: bytes) -> bool:
    r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(SHA256()))
    except InvalidSignature:
        return False
    return True


@lru_cache(maxsize=256)
def _pck_key(pem: bytes) -> _PckKey | str:
    """The platform's key, where PCK certificate and intermediate CA lead to the pinned root; else why not."""
    try:
        with reading_certificates("a certificate of the platform"):
            chain = x509.load_pem_x509_certificates(pem.rstrip(b"\0"))
            names = [_common_name(certificate) for certificate in chain]
            key = chain[0].public_key()
            constraints = chain[1].extensions.get_extension_for_class(x509.BasicConstraints).value
            fmspc = _fmspc(chain[0])
            ca = AUTHORITIES.get(str(names[1]))
    except FormatError as error:
        return f"{error.message}, or missing"
    if len(chain) > _MAX_CHAIN or names[0] != _PCK_NAME or ca is None or not constraints.ca:
        return "the platform's certificates are not those of an Intel platform"
    root = _root()
    try:
        chain[1].verify_directly_issued_by(root)
        chain[0].verify_directly_issued_by(chain[1])
    except (InvalidSignature, ValueError, TypeError):
        return "the platform's certificates do not lead to Intel's root"
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        return "the platform's key is not on P-256"
    return _PckKey(
        max(chain[0].not_valid_before_utc, chain[1].not_valid_before_utc, root.not_valid_before_utc),
        min(chain[0].not_valid_after_utc, chain[1].not_valid_after_utc, root.not_valid_after_utc),
        fmspc,
        ca,
        key,
    )


def _common_name(certificate: x509.Certificate) -> str | bytes:
    return certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value


def _fmspc(certificate: x509.Certificate) -> bytes:
    """The family of platforms that a PCK certificate is of. Raises: ValueError, x509.ExtensionNotFound."""
    extension = certificate.extensions.get_extension_for_oid(_SGX_EXTENSION).value
    if not isinstance(extension, x509.UnrecognizedExtension):
        raise TypeError("not an extension of Intel's")
    member = asn1.decode_der(_SgxExtension, extension.value).fmspc
    fmspc = bytes(member.value.data)
    if member.oid != _FMSPC or len(fmspc) != FMSPC_SIZE:
        raise ValueError("no FMSPC")
    return fmspc


@cache
def _root() -> x509.Certificate:
    """Intel SGX Root CA, SHA-256 fingerprint 44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3."""
    content = files("encfs.attestation").joinpath("data", "intel-sgx-root.pem").read_bytes()
    return x509.load_pem_x509_certificate(content)


def _check_collateral(
    findings: Findings,
    raw: bytes,
    platform: Platform,
    endorsements: Endorsements,
    policy: EvidencePolicy,
    now: datetime,
) -> None:
    collateral = next((one for one in endorsements.collateral if one.platform == platform), None)
    if collateral is None:
        missing = f"Intel's collateral for {platform} was not given"
        if policy.allow_missing_collateral:
            findings.leave_unchecked(Code.TCB_STATUS, f"{missing}: nobody looked at the firmware's status")
            findings.leave_unchecked(Code.REVOKED, f"{missing}: nobody looked whether keys were revoked")
        else:
            findings.refuse(Code.MISSING, f"{missing}: it is needed, and a PCCS or Intel's service has it")
        return
    report = _judge(findings, raw, collateral, now)
    if report is None:
        return
    findings.claims |= {"tcb_status": report.status, "advisories": sorted(report.advisory_ids)}
    if report.status not in policy.tcb_statuses:
        allowed = ", ".join(sorted(policy.tcb_statuses)) or "none"
        findings.refuse(Code.TCB_STATUS, f"the platform's TCB status is {report.status}; allowed is {allowed}")


def _judge(findings: Findings, raw: bytes, collateral: Collateral, now: datetime) -> Any | None:
    """What `dcap-qvl` says; None where it refuses, with the reason noted."""
    try:
        import dcap_qvl
    except ImportError:
        raise UnsupportedError(
            "collateral of SGX and TDX quotes needs the package dcap-qvl", hint="pip install 'encfs[dcap]'"
        ) from None
    try:
        return dcap_qvl.verify(
            raw, dcap_qvl.QuoteCollateralV3.from_json(collateral.content.decode("utf-8")), max(int(now.timestamp()), 0)
        )
    except ValueError as error:
        _refuse(findings, collateral.platform, str(error))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a panic in Rust arrives; it is no Exception
            raise
        findings.refuse(Code.COLLATERAL, f"the quote or its collateral for {collateral.platform} is malformed")
    return None


def _refuse(findings: Findings, platform: Platform, text: str) -> None:
    plain = re.sub(r"[^\x20-\x7e]+", " ", text.removeprefix("Verification failed: "))
    plain = re.sub(r" {2,}", " ", plain).strip()[:160]
    if "Debug mode" in text:
        findings.refuse(Code.DEBUG, "with collateral, quotes in debug mode cannot be accepted")
    elif re.search(r"expired|in the future|not ?yet ?valid", text, re.IGNORECASE):
        findings.refuse(
            Code.EXPIRED, f"the collateral for {platform} is not valid at this time, fetch it anew: {plain}"
        )
    elif re.search(r"revoked", text, re.IGNORECASE) and "Unknown" not in text:
        findings.refuse(Code.REVOKED, f"a certificate was revoked: {plain}")
    else:
        findings.refuse(Code.COLLATERAL, f"the collateral for {platform} does not vouch for this quote: {plain}")


def _check_enclave(findings: Findings, quote: Quote, policy: EvidencePolicy) -> None:
    body = quote.body
    # MRSIGNER with product and version identifies software as well as MRENCLAVE does.
    findings.require_one(
        Code.MEASUREMENT, "measurement (MRENCLAVE)", body["mrenclave"], policy.measurements, ask=not policy.signers
    )
    findings.require_one(Code.SIGNER, "signer (MRSIGNER)", body["mrsigner"], policy.signers, ask=False)
    if policy.product_ids and body["isv_prod_id"] not in policy.product_ids:
        findings.refuse(Code.PRODUCT, f"the product id {body['isv_prod_id']} is not one that the policy allows")
    elif policy.signers and not policy.measurements and not policy.product_ids:
        findings.leave_unchecked(
            Code.PRODUCT, "the policy names a signer and no product: any enclave of that signer does"
        )
    if body["isv_svn"] < policy.min_svn:
        findings.refuse(Code.SVN, f"the enclave's version (SVN) {body['isv_svn']} is below the floor {policy.min_svn}")
    findings.require_one(Code.HOST_DATA, "configuration id", body["config_id"], policy.host_data, ask=False)
    findings.require_absent(Code.RTMR, "run-time measurement registers", policy.rtmrs)


def _check_domain(findings: Findings, quote: Quote, policy: EvidencePolicy) -> None:
    body = quote.body
    if any(body["mrsignerseam"]) or any(body["seam_attributes"]):
        findings.refuse(Code.CHAIN, "the TDX module is not one of Intel's for production")
    if td_is_migratable(body["td_attributes"]) and not policy.allow_migration:
        findings.refuse(Code.MIGRATION, "the trust domain may be migrated to another machine")
    findings.require_one(Code.MEASUREMENT, "measurement (MRTD)", body["mrtd"], policy.measurements)
    findings.require_one(Code.HOST_DATA, "configuration id", body["mrconfigid"], policy.host_data, ask=False)
    for index, allowed in sorted(policy.rtmrs.items()):
        if index not in range(4):
            findings.refuse(Code.RTMR, f"there is no run-time measurement register {index}")
        elif body[f"rtmr{index}"] not in allowed:
            findings.refuse(Code.RTMR, f"the run-time measurement register {index} is not one that the policy allows")
    if not policy.rtmrs:
        findings.leave_unchecked(Code.RTMR, "the policy does not say what was started (RTMR 0 to 3)")
    findings.require_absent(Code.SIGNER, "signer", policy.signers)
    findings.require_absent(Code.PRODUCT, "product id", policy.product_ids)
    if policy.min_svn:
        findings.refuse(Code.SVN, "this kind of evidence has no version (SVN), which the policy asks about")
