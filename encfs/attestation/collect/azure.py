"""Evidence of an Azure confidential VM: its vTPM's quote, the report that vouches for that TPM, and what signs it.

The paravisor keeps its report (HCL) in the vTPM; the VCEK certificate (SNP) or the TDX quote over the report comes from
the host's metadata service. There is no /dev/sev-guest on these machines. Source: Microsoft's azure-cvm-tooling, and
guest-components' attesters az-snp-vtpm and az-tdx-vtpm for the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path

from encfs.attestation.azure import EVIDENCE_VERSION, HclReport, parse_hcl_report
from encfs.attestation.certificates import der_certificates
from encfs.attestation.evidence import Evidence, EvidenceKind
from encfs.encoding import b64_urlsafe_padded, b64url_encode, parse_b64_urlsafe
from encfs.errors import AttestationError, FormatError, TransportError
from encfs.strictjson import loads_object
from encfs.webclient import Address, Deadline, WebClient

#: The metadata service: link-local, without TLS. What it says is checked by whoever verifies the evidence.
METADATA_SERVICE = Address("http", "169.254.169.254", 80, "")
#: Says whether a machine is one of Azure's, and the tag of all of them.
_CHASSIS = Path("/sys/class/dmi/id/chassis_asset_tag")
_AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
_TIMEOUT = 30.0
_CERTIFICATE_PATH, _QUOTE_PATH = "/metadata/THIM/amd/certification", "/acc/tdquote"


def is_azure(chassis: Path = _CHASSIS) -> bool:
    """Whether this is one of Azure's virtual machines, found out by looking."""
    try:
        return chassis.read_text("ascii").strip() == _AZURE_TAG
    except (OSError, UnicodeDecodeError):
        return False


def provided_kind() -> EvidenceKind:
    """Whether the paravisor's report is of SNP or TDX. Raises: KeyProviderError where there is no such report."""
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.quote import read_azure_report

    return _parsed(read_azure_report()).kind


def collect_evidence(report_data: bytes, *, service: Address = METADATA_SERVICE) -> Evidence:
    """A quote over `report_data` (up to 64 bytes), with all that vouches for it.

    Raises: KeyProviderError where this is no such machine; AttestationError where its host does not help.
    """
    from encfs.tpm.availability import require_library

    require_library()
    from encfs.tpm.quote import collect_azure_evidence

    report, quote = collect_azure_evidence(report_data)
    hcl = _parsed(report)
    document: dict[str, object] = {
        "version": EVIDENCE_VERSION,
        "tpm_quote": {
            "signature": quote.raw_signature().hex(),
            "message": quote.message.hex(),
            "pcrs": [value.hex() for value in quote.pcrs],
        },
        "hcl_report": b64_urlsafe_padded(report),
    }
    if hcl.kind is EvidenceKind.AZURE_SNP_VTPM:
        document["vcek"] = b64_urlsafe_padded(_certificate(service))
    else:
        document["td_quote"] = b64_urlsafe_padded(td_quote(service, hcl))
    return Evidence(hcl.kind, json.dumps(document).encode())


def _parsed(report: bytes) -> HclReport:
    try:
        return parse_hcl_report(report)
    except FormatError as error:
        raise AttestationError(f"the report in the vTPM is malformed: {error.message}") from None


def _certificate(service: Address) -> bytes:
    answer = _asked(service, "GET", _CERTIFICATE_PATH, None)
    pem = answer.get("vcekCert")
    try:
        return der_certificates(pem.encode() if isinstance(pem, str) else b"", "vcekCert")[0]
    except FormatError:
        raise AttestationError("the metadata service gives no VCEK certificate") from None


def certificate_chain(service: Address) -> str:
    """The chip's certificate and those above it, PEM, as the host has them. Raises: AttestationError."""
    answer = _asked(service, "GET", _CERTIFICATE_PATH, None)
    leaf, above = (answer.get(name) for name in ("vcekCert", "certificateChain"))
    if not isinstance(leaf, str) or not isinstance(above, str | None):
        raise AttestationError("the metadata service gives no VCEK certificate")
    return leaf + (above or "")


def td_quote(service: Address, hcl: HclReport) -> bytes:
    """Intel's quote over the report of a TD. Raises: AttestationError."""
    answer = _asked(service, "POST", _QUOTE_PATH, {"report": b64url_encode(hcl.hardware_report)})
    try:
        return parse_b64_urlsafe(answer.get("quote"), "the TDX quote of the metadata service")
    except FormatError as error:
        raise AttestationError(error.message) from None


def _asked(service: Address, method: str, path: str, body: dict[str, str] | None) -> dict[str, object]:
    headers = {"Metadata": "true"} | ({"Content-Type": "application/json"} if body is not None else {})
    content = json.dumps(body).encode() if body is not None else None
    try:
        with WebClient(service, Deadline(_TIMEOUT)) as client:
            answer = client.exchange(method, path, body=content, headers=headers)
    except TransportError as error:
        raise AttestationError(f"Azure's metadata service gives no answer: {error.message}") from None
    if answer.status != 200:
        raise AttestationError(f"Azure's metadata service refuses {path} with status {answer.status}")
    try:
        return loads_object(answer.body, limit=len(answer.body), what="the answer")
    except FormatError as error:
        raise AttestationError(f"Azure's metadata service answers with no JSON: {error.message}") from None
