"""Judge evidence against a policy: hand it to the verifier of its kind, return a verdict.

A refusal is a verdict, never an exception; FormatError is for what cannot be read at all. Nothing here asks the
network: certificates, collateral and keys are given.
"""

from __future__ import annotations

from datetime import datetime

from encfs.attestation import azure, dcap, ear, eventlog, maa, sample, snp, tpmquote
from encfs.attestation.evidence import Endorsements, Evidence, EvidenceKind
from encfs.attestation.findings import Findings
from encfs.attestation.parsing import parse_evidence, recognise
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.quotes import parse_quote
from encfs.attestation.verdict import Code, Verdict

__all__ = ["recognise", "verify_evidence"]


def verify_evidence(
    evidence: bytes | Evidence,
    policy: EvidencePolicy,
    *,
    endorsements: Endorsements = Endorsements(),  # noqa: B008 -- immutable
    now: datetime,
) -> Verdict:
    """Whether evidence is genuine and shows what the policy asks for, at the time `now` (with its zone).

    `endorsements` are looked at together with those that came with the evidence; neither is trusted.

    Raises: FormatError where the evidence is of no known kind, too large or malformed; UnsupportedError where an
    optional package that its kind needs is not installed.
    """
    if now.tzinfo is None:
        raise ValueError("now needs a time zone")
    given = parse_evidence(evidence) if isinstance(evidence, bytes) else evidence
    findings = Findings()
    if given.kind not in policy.kinds:
        code = Code.SAMPLE if given.kind is EvidenceKind.SAMPLE else Code.KIND
        findings.refuse(code, f"evidence of the kind {given.kind} is not accepted by the policy")
    together = Endorsements(
        given.endorsements.certificates + endorsements.certificates,
        endorsements.collateral,
        endorsements.event_log if endorsements.event_log is not None else given.endorsements.event_log,
    )
    _check(findings, given, together, policy, now)
    if together.event_log is not None:
        eventlog.check_event_log(findings, together.event_log, policy.event_log_pcrs)
    findings.require_claims(policy)
    return findings.verdict(given.kind)


def _check(
    findings: Findings, evidence: Evidence, endorsements: Endorsements, policy: EvidencePolicy, now: datetime
) -> None:
    match evidence.kind:
        case EvidenceKind.SNP:
            report = snp.parse_report(evidence.content)
            snp.check_report(findings, report, endorsements.certificates, policy, now)
            snp.check_report_data(findings, report, policy)
        case EvidenceKind.TDX | EvidenceKind.SGX:
            quote = parse_quote(evidence.content)
            dcap.check_quote(findings, evidence.content, quote, endorsements, policy, now)
            dcap.check_report_data(findings, quote, policy)
        case EvidenceKind.TPM:
            tpmquote.check_tpm_quote(findings, tpmquote.parse_tpm_evidence(evidence.content), policy)
        case EvidenceKind.AZURE_SNP_VTPM | EvidenceKind.AZURE_TDX_VTPM:
            parts = azure.parse_azure_evidence(evidence.kind, evidence.content)
            azure.check_azure(findings, parts, endorsements, policy, now)
        case EvidenceKind.MAA:
            maa.check_maa(findings, evidence.content, policy, now)
        case EvidenceKind.EAR:
            ear.check_ear(findings, evidence.content, policy, now)
        case EvidenceKind.SAMPLE:
            sample.check_sample(findings, evidence.content, policy)
