"""Tokens of Microsoft Azure Attestation: Microsoft verified the evidence, and says in a token what it showed.

Tokens of containers (ACI, AKS) have the claims of the TEE at the top, those of virtual machines below
`x-ms-isolation-tee`, under the guest's own. Source: Microsoft's documentation, "Claim sets in Azure Attestation".
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from encfs.attestation.findings import Findings
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.quotes import td_is_inspectable, td_is_migratable
from encfs.attestation.tokens import check_nonce, check_signature, parse_token
from encfs.attestation.verdict import Code
from encfs.encoding import hex_decode
from encfs.errors import FormatError

_COMPLIANT = ("azure-compliant-cvm", "azure-compliant-uvm")
_SNP, _TDX = "sevsnpvm", "tdxvm"
_TD_ATTRIBUTES_SIZE = 8
_SNP_TEXTS = {
    "measurement": "x-ms-sevsnpvm-launchmeasurement",
    "host_data": "x-ms-sevsnpvm-hostdata",
    "signer": "x-ms-sevsnpvm-idkeydigest",
    "report_data": "x-ms-sevsnpvm-reportdata",
}
_SNP_NUMBERS = {"vmpl": "x-ms-sevsnpvm-vmpl", "svn": "x-ms-sevsnpvm-guestsvn"}
_SNP_FLAGS = {"debug": "x-ms-sevsnpvm-is-debuggable", "migration": "x-ms-sevsnpvm-migration-allowed"}
_TCB = {"bootloader": "bootloader", "tee": "tee", "snp": "snpfw", "microcode": "microcode"}
_TDX_TEXTS = {"measurement": "tdx_mrtd", "host_data": "tdx_mrconfigid", "report_data": "tdx_report_data"}


def check_maa(findings: Findings, content: bytes, policy: EvidencePolicy, now: datetime) -> None:
    """Signature, issuer, compliance, and what the policy asks of the TEE. Raises: FormatError."""
    token = parse_token(content)
    if not policy.issuers:
        findings.refuse(Code.ISSUER, "the policy names no issuer: every customer has an instance that issues tokens")
    if not check_signature(findings, token, policy, now):
        return
    nested = token.claims.get("x-ms-isolation-tee")
    tee: Mapping[str, object] = nested if isinstance(nested, dict) else token.claims
    kind = tee.get("x-ms-attestation-type")
    findings.claims["attestation_type"] = str(kind)
    status = tee.get("x-ms-compliance-status")
    findings.claims["compliance"] = str(status)
    if status not in _COMPLIANT:
        findings.refuse(Code.STATUS, f"Azure does not call the machine compliant ({ascii(status)[:40]})")
    if kind == _SNP:
        _check_snp(findings, tee, policy)
        about = {"measurements", "signers", "min_svn", "host_data", "tcb_floors", "nonce", "issuers"}
    elif kind == _TDX:
        _check_tdx(findings, tee, policy)
        about = {"measurements", "host_data", "rtmrs", "nonce", "issuers"}
    else:
        findings.refuse(Code.UNSUPPORTED, f"tokens about {ascii(kind)[:24]} are not supported: they prove no TEE")
        return
    check_nonce(findings, (token.claims.get("nonce"),), policy)
    findings.require_nothing_else(policy, about)


def _check_snp(findings: Findings, tee: Mapping[str, object], policy: EvidencePolicy) -> None:
    values = {name: _hex(tee, member) for name, member in _SNP_TEXTS.items()}
    findings.claims |= {name: value.hex() for name, value in values.items()}
    numbers = {name: _number(tee, member) for name, member in _SNP_NUMBERS.items()}
    findings.claims |= numbers
    flags = {name: _flag(tee, member) for name, member in _SNP_FLAGS.items()}
    findings.claims |= flags
    tcb = {name: _number(tee, f"x-ms-sevsnpvm-{member}-svn") for name, member in _TCB.items()}
    findings.claims["tcb"] = tcb
    if flags["debug"] and not policy.allow_debug:
        findings.refuse(Code.DEBUG, "the guest may be debugged: its host can read its memory")
    if flags["migration"] and not policy.allow_migration:
        findings.refuse(Code.MIGRATION, "the guest may be moved to another machine by a migration agent")
    if numbers["vmpl"] > policy.max_vmpl:
        findings.refuse(Code.VMPL, f"the report was asked for from VMPL {numbers['vmpl']}, above {policy.max_vmpl}")
    if numbers["svn"] < policy.min_svn:
        findings.refuse(Code.SVN, f"the guest's SVN {numbers['svn']} is below {policy.min_svn}")
    for floor in policy.tcb_floors:
        if floor.product is not None:
            findings.refuse(Code.TCB, "the token does not say of which CPU generation the machine is")
        elif any(tcb[name] < getattr(floor, name) for name in tcb):
            findings.refuse(Code.TCB, "a version of the SNP firmware is below its floor")
    findings.require_one(Code.MEASUREMENT, "measurement", values["measurement"], policy.measurements)
    findings.require_one(Code.HOST_DATA, "host data", values["host_data"], policy.host_data, ask=False)
    findings.require_one(Code.SIGNER, "ID key digest", values["signer"], policy.signers, ask=False)
    if policy.report_data is not None or policy.nonce is None:
        findings.require_report_data(values["report_data"], policy.report_data)


def _check_tdx(findings: Findings, tee: Mapping[str, object], policy: EvidencePolicy) -> None:
    values = {name: _hex(tee, member) for name, member in _TDX_TEXTS.items()}
    findings.claims |= {name: value.hex() for name, value in values.items()}
    attributes = _hex(tee, "tdx_td_attributes")
    if len(attributes) != _TD_ATTRIBUTES_SIZE:
        raise FormatError(f"tdx_td_attributes of the token is not {_TD_ATTRIBUTES_SIZE} bytes")
    debug, migration = td_is_inspectable(attributes), td_is_migratable(attributes)
    rtmrs = {index: _hex(tee, f"tdx_rtmr{index}") for index in range(4)}
    findings.claims |= {
        "debug": debug,
        "migration": migration,
        "rtmrs": {str(index): value.hex() for index, value in rtmrs.items()},
    }
    if debug and not policy.allow_debug:
        findings.refuse(Code.DEBUG, "the trust domain is in debug mode: its host can read its memory")
    if migration and not policy.allow_migration:
        findings.refuse(Code.MIGRATION, "the trust domain may be moved to another machine")
    status = tee.get("attester_tcb_status")
    findings.claims["tcb_status"] = str(status)
    if status not in policy.tcb_statuses:
        findings.refuse(Code.TCB_STATUS, f"the TCB status is {ascii(status)[:40]}, which the policy does not allow")
    findings.require_one(Code.MEASUREMENT, "measurement", values["measurement"], policy.measurements)
    findings.require_one(Code.HOST_DATA, "host data", values["host_data"], policy.host_data, ask=False)
    for index, allowed in sorted(policy.rtmrs.items()):
        findings.require_one(Code.RTMR, f"RTMR {index}", rtmrs.get(index, b""), allowed)
    if policy.report_data is not None or policy.nonce is None:
        findings.require_report_data(values["report_data"], policy.report_data)


def _hex(tee: Mapping[str, object], name: str) -> bytes:
    return hex_decode(tee.get(name), f"{name} of the token")


def _number(tee: Mapping[str, object], name: str) -> int:
    value = tee.get(name)
    if type(value) is not int or value < 0:
        raise FormatError(f"{name} of the token is no number")
    return value


def _flag(tee: Mapping[str, object], name: str) -> bool:
    value = tee.get(name)
    if not isinstance(value, bool):
        raise FormatError(f"{name} of the token is neither true nor false")
    return value
