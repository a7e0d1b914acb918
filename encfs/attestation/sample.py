"""Evidence of the kind `sample`, for demonstrations: anyone can make it, and it proves nothing.

It is judged only where a policy names its kind; what it carries is still compared with what the session expects.
"""

from __future__ import annotations

from encfs.attestation.evidence import MAX_EVIDENCE_SIZE
from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Code
from encfs.encoding import b64_decode
from encfs.errors import FormatError
from encfs.strictjson import loads_object

_MAX_REPORT_DATA = 64


def check_sample(findings: Findings, content: bytes, policy: EvidencePolicy) -> None:
    """The report data, and that the policy asks for nothing that only a TEE could show. Raises: FormatError."""
    document = loads_object(content, limit=MAX_EVIDENCE_SIZE, what="the evidence")
    report_data = b64_decode(document.get("report_data"), "report_data")
    if len(report_data) > _MAX_REPORT_DATA:
        raise FormatError(f"report_data of the evidence is more than {_MAX_REPORT_DATA} bytes")
    findings.claims["report_data"] = report_data.hex()
    findings.leave_unchecked(Code.SAMPLE, "sample evidence proves nothing: anyone can make it")
    findings.require_report_data(report_data, policy.report_data)
    findings.require_nothing_else(policy, frozenset())
