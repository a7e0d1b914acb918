"""Tell the kinds of evidence apart and bring each into one form, whatever file or protocol it came in.

Bytes (reports, quotes), JSON documents (as attesters of Confidential Containers write them) and tokens are recognised
by their content. Nothing is verified here.
"""

from __future__ import annotations

import struct

from encfs.attestation import azure, kbs, quotes, snp
from encfs.attestation.evidence import MAX_EVIDENCE_SIZE, Endorsements, Evidence, EvidenceKind
from encfs.encoding import b64url_decode
from encfs.errors import FormatError
from encfs.strictjson import loads_object

_HINT = "known are SNP reports, TDX and SGX quotes, JSON evidence of TPMs and Azure's vTPM, and MAA or EAR tokens"
_WHITESPACE = b" \t\r\n"


def recognise(content: bytes) -> EvidenceKind:
    """The kind of some evidence. Raises: FormatError where it is none that is known."""
    return parse_evidence(content).kind


def parse_evidence(content: bytes) -> Evidence:
    """Evidence from the content of a file or message.

    An SNP report may be followed by the certificate table of an extended report.

    Raises: FormatError where it is larger than 1 MiB, of no known kind, cut short or otherwise malformed.
    """
    if len(content) > MAX_EVIDENCE_SIZE:
        raise FormatError(f"the evidence is {len(content)} bytes, more than the {MAX_EVIDENCE_SIZE} allowed")
    text = content.strip(_WHITESPACE)
    if not text:
        raise FormatError("the evidence is empty")
    if text.startswith(b"{"):
        return kbs.parse_document(loads_object(text, limit=MAX_EVIDENCE_SIZE, what="the evidence"))
    if text.startswith(b"ey") and text.count(b".") == 2:
        return Evidence(_token_kind(text), text)
    if content.startswith(azure.MAGIC):
        return Evidence(azure.parse_hcl_report(content).kind, content)
    if kind := quotes.quote_kind(content):
        return Evidence(kind, content)
    if len(content) >= 4 and struct.unpack_from("<I", content)[0] in range(1, 32) and len(content) >= snp.REPORT_SIZE:
        certificates = snp.parse_certificate_table(content[snp.REPORT_SIZE :])
        return Evidence(EvidenceKind.SNP, content[: snp.REPORT_SIZE], Endorsements(certificates))
    raise FormatError("this is no evidence that is known, or it is cut short", hint=_HINT)


def _token_kind(text: bytes) -> EvidenceKind:
    payload = text.split(b".")[1].decode("ascii", "replace")
    claims = loads_object(b64url_decode(payload, "the payload of the token"), limit=MAX_EVIDENCE_SIZE, what="the token")
    if "x-ms-ver" in claims or "x-ms-attestation-type" in claims:
        return EvidenceKind.MAA
    if "submods" in claims or "eat_profile" in claims or "ear.status" in claims:
        return EvidenceKind.EAR
    raise FormatError("the token is neither one of Microsoft Azure Attestation nor an EAR", hint=_HINT)
