"""Evidence of Azure's confidential VMs: a vTPM's quote, and the hardware report that vouches for the vTPM.

The paravisor below the guest (HCL) has the hardware report on the digest of its runtime data, a JSON document with the
public half of the vTPM's attestation key (`HCLAkPub`). So the chain is: AMD's or Intel's root, hardware report, runtime
data, attestation key, quote. Source: Microsoft's azure-cvm-tooling; trustee's verifiers az-snp-vtpm, az-tdx-vtpm.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import rsa

from encfs.attestation import dcap, snp, tpmquote
from encfs.attestation.certificates import der_certificates
from encfs.attestation.evidence import MAX_EVIDENCE_SIZE, Endorsements, EvidenceKind
from encfs.attestation.fields import Table
from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.quotes import parse_quote
from encfs.attestation.verdict import ClaimValue, Code
from encfs.encoding import b64url_decode, hex_decode, parse_b64_urlsafe
from encfs.errors import FormatError
from encfs.strictjson import loads_object

#: Of the JSON form that is written; 2 has the same members, and before 1 there was no number.
EVIDENCE_VERSION = 1
_VERSIONS = (1, 2)
MAGIC = b"HCLA"
_MAX_REPORT = 16 << 10

_REPORT_OFFSET, _REPORT_AREA = 32, 1184
_TD_REPORT_SIZE = 1024
#: Behind the hardware report: what the runtime data is, and how long.
_RUNTIME = Table(
    "runtime data of the HCL report",
    20,
    "<",
    {
        "size": (0, "u32"),
        "version": (4, "u32"),
        "report_type": (8, "u32"),
        "hash_type": (12, "u32"),
        "json_size": (16, "u32"),
    },
)
_RUNTIME_OFFSET = _REPORT_OFFSET + _REPORT_AREA
_KINDS = {2: EvidenceKind.AZURE_SNP_VTPM, 4: EvidenceKind.AZURE_TDX_VTPM}
_SHA256 = 1
_AK = "HCLAkPub"
# TPM_ALG_RSASSA, TPM_ALG_SHA256: Azure's quotes carry a bare signature.
_AK_SCHEME, _AK_HASH = 0x0014, 0x000B


@dataclass(frozen=True, slots=True)
class HclReport:
    """The paravisor's report in its parts. `runtime_data` is the JSON that the hardware report is bound to."""

    kind: EvidenceKind
    #: SNP report, or the TDREPORT (of no use without a quote over it).
    hardware_report: bytes = field(repr=False)
    runtime_data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class AzureEvidence:
    """A report with or without the quote and what vouches for the report."""

    report: HclReport
    message: bytes | None = field(default=None, repr=False)
    signature: bytes = field(default=b"", repr=False)
    pcrs: tuple[bytes, ...] = field(default=(), repr=False)
    certificates: tuple[bytes, ...] = field(default=(), repr=False)
    td_quote: bytes | None = field(default=None, repr=False)


def parse_hcl_report(data: bytes) -> HclReport:
    """Raises: FormatError where it is cut short or of a kind that is not known."""
    if not data.startswith(MAGIC) or len(data) > _MAX_REPORT:
        raise FormatError("it is no HCL report of an Azure confidential VM")
    runtime = _RUNTIME.read(data, _RUNTIME_OFFSET)
    kind = _KINDS.get(runtime["report_type"])
    if kind is None or runtime["hash_type"] != _SHA256:
        raise FormatError(
            f"HCL reports of type {runtime['report_type']} with hash {runtime['hash_type']} are not supported"
        )
    start = _RUNTIME_OFFSET + _RUNTIME.size
    content = data[start : start + runtime["json_size"]]
    if len(content) != runtime["json_size"]:
        raise FormatError("the runtime data of the HCL report is cut short")
    size = snp.REPORT_SIZE if kind is EvidenceKind.AZURE_SNP_VTPM else _TD_REPORT_SIZE
    return HclReport(kind, data[_REPORT_OFFSET : _REPORT_OFFSET + size], content)


def parse_azure_evidence(kind: EvidenceKind, content: bytes) -> AzureEvidence:
    """The parts of a bare report, or of evidence as attesters write it. Raises: FormatError."""
    if content.startswith(MAGIC):
        return AzureEvidence(parse_hcl_report(content))
    document = loads_object(content, limit=MAX_EVIDENCE_SIZE, what="the evidence")
    found = _first_form(document) if "version" not in document else _later_form(document)
    if found.report.kind is not kind:
        raise FormatError("the HCL report of the evidence is of another kind than what comes with it")
    return found


def _later_form(document: Mapping[str, object]) -> AzureEvidence:
    if document["version"] not in _VERSIONS:
        raise FormatError("Azure's evidence has a version that is not supported")
    quote = _members(document.get("tpm_quote"), "tpm_quote")
    certificates = (parse_b64_urlsafe(document["vcek"], "vcek"),) if "vcek" in document else ()
    return AzureEvidence(
        parse_hcl_report(parse_b64_urlsafe(document.get("hcl_report"), "hcl_report")),
        hex_decode(quote.get("message"), "message of the TPM quote"),
        hex_decode(quote.get("signature"), "signature of the TPM quote"),
        tpmquote.parse_pcrs(quote.get("pcrs")),
        certificates,
        parse_b64_urlsafe(document["td_quote"], "td_quote") if "td_quote" in document else None,
    )


def _first_form(document: Mapping[str, object]) -> AzureEvidence:
    """Arrays of numbers, and the certificate in PEM."""
    quote = _members(document.get("quote"), "quote")
    pcrs = quote.get("pcrs")
    if not isinstance(pcrs, list):
        raise FormatError("pcrs of the TPM quote is not a list")
    pem = document.get("vcek")
    if not isinstance(pem, str):
        raise FormatError("vcek of the evidence is no certificate in PEM")
    return AzureEvidence(
        parse_hcl_report(_numbers(document.get("report"), "report")),
        _numbers(quote.get("message"), "message of the TPM quote"),
        _numbers(quote.get("signature"), "signature of the TPM quote"),
        tpmquote.parse_pcrs([_numbers(one, "a PCR").hex() for one in pcrs]),
        der_certificates(pem.encode(), "vcek of the evidence"),
    )


def _numbers(value: object, what: str) -> bytes:
    if isinstance(value, list) and all(type(one) is int and 0 <= one <= 255 for one in value):
        return bytes(value)
    raise FormatError(f"{what} is not a list of bytes")


def _members(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise FormatError(f"{what} of the evidence is not a JSON object")
    return value


def check_azure(
    findings: Findings, evidence: AzureEvidence, endorsements: Endorsements, policy: EvidencePolicy, now: datetime
) -> None:
    """The whole chain. Raises: FormatError for malformed parts."""
    digest = hashlib.sha256(evidence.report.runtime_data).digest()
    # What the policy says of fresh data and PCRs is about the quote, the rest about the hardware. The report has to be
    # the paravisor's, at VMPL 0 whatever else may ask: what runs above it could vouch for a TPM of its own.
    hardware = replace(policy, pcrs={}, report_data=None, max_vmpl=0)
    if evidence.report.kind is EvidenceKind.AZURE_SNP_VTPM:
        report = snp.parse_report(evidence.report.hardware_report)
        certificates = evidence.certificates + endorsements.certificates
        snp.check_report(findings, report, certificates, hardware, now)
        _check_binding(findings, report.report_data, digest)
    elif evidence.td_quote is None:
        findings.refuse(Code.MISSING, "no TDX quote comes with the report, and only the machine itself can check it")
    else:
        quote = parse_quote(evidence.td_quote)
        if quote.kind is not EvidenceKind.TDX:
            raise FormatError("td_quote of the evidence is no TDX quote")
        dcap.check_quote(findings, evidence.td_quote, quote, endorsements, hardware, now)
        _check_binding(findings, quote.body["report_data"], digest)
    runtime = loads_object(evidence.report.runtime_data, limit=_MAX_REPORT, what="the runtime data")
    findings.claims["vm_configuration"] = _configuration(runtime)
    _check_quote(findings, evidence, _attestation_key(runtime), policy)


def _check_binding(findings: Findings, report_data: bytes, digest: bytes) -> None:
    if not hmac.compare_digest(report_data, digest.ljust(len(report_data), b"\0")):
        findings.refuse(Code.BINDING, "the hardware report does not vouch for this runtime data and its TPM")


def _check_quote(findings: Findings, evidence: AzureEvidence, key: rsa.RSAPublicKey, policy: EvidencePolicy) -> None:
    if evidence.message is None:
        wanted = policy.report_data is not None or policy.pcrs
        judge = findings.refuse if wanted else findings.leave_unchecked
        judge(Code.MISSING, "no TPM quote comes with the report: it may be an old one, and says nothing of PCRs")
        return
    # Both have a firmware; the claim is the hardware's.
    firmware = findings.claims.get("firmware")
    statement = tpmquote.parse_statement(evidence.message)
    signature = tpmquote.Signature(_AK_SCHEME, _AK_HASH, evidence.signature)
    tpmquote.check_statement(findings, statement, evidence.message, signature, key)
    if firmware is not None:
        findings.claims["firmware"] = firmware
    else:
        findings.claims.pop("firmware", None)
    tpmquote.check_pcrs(findings, statement, signature, evidence.pcrs, policy)
    if policy.pcrs and not policy.measurements and not policy.signers:
        # Whoever has such hardware launches something of his own that vouches for a key of his own.
        findings.refuse(Code.MEASUREMENT, "the policy asks about PCRs, and not which paravisor may state them")
    tpmquote.check_qualifying_data(findings, statement.extra_data, policy.report_data)


def _attestation_key(runtime: Mapping[str, object]) -> rsa.RSAPublicKey:
    keys = runtime.get("keys")
    found = [one for one in keys if isinstance(one, dict) and one.get("kid") == _AK] if isinstance(keys, list) else []
    if len(found) != 1 or found[0].get("kty") != "RSA":
        raise FormatError(f"the runtime data of the HCL report has no one RSA key {_AK}")
    n, e = (b64url_decode(found[0].get(name), f"{name} of {_AK}") for name in "ne")
    try:
        return rsa.RSAPublicNumbers(int.from_bytes(e), int.from_bytes(n)).public_key()
    except ValueError:
        raise FormatError(f"{_AK} of the runtime data is no RSA key") from None


def _configuration(runtime: Mapping[str, object]) -> ClaimValue:
    found = runtime.get("vm-configuration")
    members = found if isinstance(found, dict) else {}
    return {str(name): value for name, value in members.items() if isinstance(value, str | int)}
