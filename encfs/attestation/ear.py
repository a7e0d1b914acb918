"""Entity attestation results (EAR): tokens in which a verifier such as Trustee says what it made of evidence.

Every part of the machine (`submods`) must be affirmed. Source: draft-ietf-rats-ear; Trustee's attestation service for
`ear.veraison.annotated-evidence`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.tokens import check_nonce, check_signature, parse_token
from encfs.attestation.verdict import Code
from encfs.encoding import hex_decode
from encfs.errors import FormatError

# By name, or as a number (trust tier).
_AFFIRMING = ("affirming", 2)
_MAX_PARTS = 16
_MAIN_PART = "cpu0"
_EVIDENCE = "ear.veraison.annotated-evidence"
# Where each verifier of Trustee's puts the launch measurement, below the annotated evidence.
_MEASUREMENTS = (("snp", "measurement"), ("tdx", "quote", "body", "mr_td"), ("sgx", "body", "mr_enclave"))


def check_ear(findings: Findings, content: bytes, policy: EvidencePolicy, now: datetime) -> None:
    """Signature, issuer, dates, status of every part; measurement and fresh data. Raises: FormatError."""
    token = parse_token(content)
    if not check_signature(findings, token, policy, now):
        return
    parts = token.claims.get("submods")
    if parts is None:
        parts = {_MAIN_PART: token.claims}
    if not isinstance(parts, dict) or not 0 < len(parts) <= _MAX_PARTS:
        raise FormatError(f"submods of the token is not 1 to {_MAX_PARTS} parts")
    statuses: dict[str, str] = {}
    for name, part in parts.items():
        status = part.get("ear.status") if isinstance(part, dict) else None
        statuses[name] = str(status)
        # True == 1 in Python, and is no tier.
        if isinstance(status, bool) or status not in _AFFIRMING:
            findings.refuse(Code.STATUS, f"the verifier does not affirm {name[:32]!a}: {ascii(status)[:32]}")
    findings.claims["statuses"] = statuses
    main = parts.get(_MAIN_PART)
    evidence = main.get(_EVIDENCE) if isinstance(main, dict) else None
    _check_evidence(findings, evidence if isinstance(evidence, dict) else {}, policy)
    nonces = token.claims.get("eat_nonce")
    check_nonce(findings, nonces if isinstance(nonces, list) else (nonces,), policy)
    findings.leave_unchecked(Code.DEBUG, "debug, migration and firmware are the verifier's to judge, by its own policy")
    findings.require_nothing_else(policy, {"measurements", "nonce", "issuers"})


def _check_evidence(findings: Findings, evidence: Mapping[str, object], policy: EvidencePolicy) -> None:
    measurement = next((value for path in _MEASUREMENTS if (value := _at(evidence, path)) is not None), None)
    if measurement is not None:
        findings.claims["measurement"] = measurement.hex()
    findings.require_one(Code.MEASUREMENT, "measurement", measurement or b"", policy.measurements)
    report_data = _at(evidence, ("report_data",))
    if report_data is not None:
        findings.claims["report_data"] = report_data.hex()
    if policy.report_data is not None or policy.nonce is None:
        findings.require_report_data(report_data or b"", policy.report_data)


def _at(members: Mapping[str, object], path: tuple[str, ...]) -> bytes | None:
    found: object = members
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    if found is None:
        return None
    return hex_decode(found, f"{path[-1]} of the token")
