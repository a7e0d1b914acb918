"""AMD SEV-SNP attestation reports: the structure, and the checks.

Source: AMD publication 56860, "SEV Secure Nested Paging Firmware ABI Specification", revision 1.58, tables 23 to 28.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from encfs.attestation.amd import EndorsementKey, Tcb, endorsement_key
from encfs.attestation.fields import Table
from encfs.attestation.findings import Findings, shorten
from encfs.attestation.policy import EvidencePolicy, SnpTcbFloor
from encfs.attestation.verdict import Code
from encfs.errors import FormatError

REPORT_SIZE = 1184
#: Versions of the report that are understood.
VERSIONS = range(2, 6)

#: ATTESTATION_REPORT. CPUID fields since version 3, mitigation vectors since version 5: reserved (zero) before.
REPORT = Table(
    "SNP report",
    REPORT_SIZE,
    "<",
    {
        "version": (0x000, "u32"),
        "guest_svn": (0x004, "u32"),
        "policy": (0x008, "u64"),
        "family_id": (0x010, 16),
        "image_id": (0x020, 16),
        "vmpl": (0x030, "u32"),
        "signature_algorithm": (0x034, "u32"),
        "current_tcb": (0x038, 8),
        "platform_info": (0x040, "u64"),
        "key_info": (0x048, "u32"),
        "report_data": (0x050, 64),
        "measurement": (0x090, 48),
        "host_data": (0x0C0, 32),
        "id_key_digest": (0x0E0, 48),
        "author_key_digest": (0x110, 48),
        "report_id": (0x140, 32),
        "report_id_ma": (0x160, 32),
        "reported_tcb": (0x180, 8),
        "cpuid_family": (0x188, "u8"),
        "cpuid_model": (0x189, "u8"),
        "cpuid_stepping": (0x18A, "u8"),
        "chip_id": (0x1A0, 64),
        "committed_tcb": (0x1E0, 8),
        "current_build": (0x1E8, "u8"),
        "current_minor": (0x1E9, "u8"),
        "current_major": (0x1EA, "u8"),
        "committed_build": (0x1EC, "u8"),
        "committed_minor": (0x1ED, "u8"),
        "committed_major": (0x1EE, "u8"),
        "launch_tcb": (0x1F0, 8),
        "launch_mitigations": (0x1F8, "u64"),
        "current_mitigations": (0x200, "u64"),
        "signature_r": (0x2A0, 72),
        "signature_s": (0x2E8, 72),
        "signature_reserved": (0x330, 368),
    },
)
_SIGNED_SIZE = 0x2A0

# POLICY, table 10.
_POLICY_MIGRATION = 1 << 18
_POLICY_DEBUG = 1 << 19
_POLICY_SMT = 1 << 16
# KEY_INFO.
_KEY_AUTHOR = 1 << 0
_KEY_SIGNING_SHIFT, _KEY_SIGNING_MASK = 2, 0b111
_SIGNING_KEYS = {0: "VCEK", 1: "VLEK"}

_ECDSA_P384_SHA384 = 1
_COMPONENT_SIZE = 48

# Where each number stands in the eight bytes of a TCB_VERSION (table 3; other from Turin on).
_TCB_BEFORE_TURIN = {"bootloader": 0, "tee": 1, "snp": 6, "microcode": 7}
_TCB_TURIN = {"fmc": 0, "bootloader": 1, "tee": 2, "snp": 3, "microcode": 7}


@dataclass(frozen=True)
class SnpReport:
    """A parsed report; nothing of it is proven yet. Fields by the names of `REPORT`."""

    raw: bytes = field(repr=False)
    version: int
    guest_svn: int
    policy: int
    family_id: bytes
    image_id: bytes
    vmpl: int
    signature_algorithm: int
    current_tcb: bytes
    platform_info: int
    key_info: int
    report_data: bytes
    measurement: bytes
    host_data: bytes
    id_key_digest: bytes
    author_key_digest: bytes
    report_id: bytes
    report_id_ma: bytes
    reported_tcb: bytes
    cpuid_family: int
    cpuid_model: int
    cpuid_stepping: int
    chip_id: bytes
    committed_tcb: bytes
    current_build: int
    current_minor: int
    current_major: int
    committed_build: int
    committed_minor: int
    committed_major: int
    launch_tcb: bytes
    launch_mitigations: int
    current_mitigations: int
    signature_r: bytes
    signature_s: bytes
    signature_reserved: bytes

    @property
    def debug(self) -> bool:
        return bool(self.policy & _POLICY_DEBUG)

    @property
    def migration(self) -> bool:
        return bool(self.policy & _POLICY_MIGRATION)

    @property
    def smt(self) -> bool:
        return bool(self.policy & _POLICY_SMT)

    @property
    def signing_key(self) -> str | None:
        """VCEK or VLEK; None for anything else (an unsigned report has 7)."""
        return _SIGNING_KEYS.get(self.key_info >> _KEY_SIGNING_SHIFT & _KEY_SIGNING_MASK)

    @property
    def product(self) -> str | None:
        """The CPU generation as CPUID names it; None before version 3, and for an unknown one."""
        if self.version < 3:
            return None
        return product_of(self.cpuid_family, self.cpuid_model)


def product_of(family: int, model: int) -> str | None:
    """The generation of a CPU by its combined CPUID family and model."""
    match family:
        case 0x19 if model <= 0x0F:
            return "Milan"
        case 0x19 if 0x10 <= model <= 0x1F or 0xA0 <= model <= 0xAF:
            return "Genoa"
        case 0x1A if model <= 0x11:
            return "Turin"
    return None


def parse_report(data: bytes) -> SnpReport:
    """Raises: FormatError where it is not exactly 1184 bytes."""
    if len(data) != REPORT_SIZE:
        raise FormatError(f"an SNP report is {REPORT_SIZE} bytes, not {len(data)}")
    return SnpReport(raw=data, **REPORT.read(data))


def parse_tcb(raw: bytes, product: str) -> Tcb:
    """The numbers in a TCB_VERSION of eight bytes."""
    places = _TCB_TURIN if product == "Turin" else _TCB_BEFORE_TURIN
    return Tcb(**{name: raw[place] for name, place in places.items()})


def write_tcb(tcb: Tcb, product: str) -> bytes:
    """The inverse of `parse_tcb`. Raises: FormatError."""
    raw = bytearray(8)
    places = _TCB_TURIN if product == "Turin" else _TCB_BEFORE_TURIN
    for name, place in places.items():
        number = getattr(tcb, name)
        if number is None or not 0 <= number <= 255:
            raise FormatError(f"{name} of an SNP TCB version is not 0 to 255")
        raw[place] = number
    return bytes(raw)


def check_report(
    findings: Findings, report: SnpReport, certificates: Sequence[bytes], policy: EvidencePolicy, now: datetime
) -> None:
    """Everything but REPORT_DATA, which means different things in a report by itself and in one of Azure's."""
    _claim(findings, report)
    if report.version not in VERSIONS:
        findings.refuse(Code.UNSUPPORTED, f"SNP reports of version {report.version} are not supported")
        return
    endorsement = _check_signature(findings, report, certificates, now)
    _check_guest(findings, report, policy)
    _check_platform(findings, report, endorsement, policy)


def check_report_data(findings: Findings, report: SnpReport, policy: EvidencePolicy) -> None:
    findings.require_report_data(report.report_data, policy.report_data)


def _claim(findings: Findings, report: SnpReport) -> None:
    findings.claims |= {
        "version": report.version,
        "measurement": report.measurement.hex(),
        "report_data": report.report_data.hex(),
        "host_data": report.host_data.hex(),
        "debug": report.debug,
        "migration": report.migration,
        "smt": report.smt,
        "vmpl": report.vmpl,
        "svn": report.guest_svn,
        "signer": report.id_key_digest.hex(),
        "author": report.author_key_digest.hex(),
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "chip_id": report.chip_id.hex(),
        "guest_policy": f"{report.policy:#x}",
        "platform_info": f"{report.platform_info:#x}",
        "signing_key": report.signing_key or "none",
        "firmware": f"{report.current_major}.{report.current_minor}.{report.current_build}",
    }
    if report.version >= 5:
        findings.claims |= {"mitigations": f"{report.current_mitigations:#x}"}


def _check_signature(
    findings: Findings, report: SnpReport, certificates: Sequence[bytes], now: datetime
) -> EndorsementKey | None:
    """Signature, certificate and whether they belong together; the key where all of it holds."""
    wanted = report.signing_key
    if wanted is None:
        findings.refuse(Code.SIGNATURE, "the report is not signed, or by a kind of key that is not known")
        return None
    if report.signature_algorithm != _ECDSA_P384_SHA384:
        findings.refuse(Code.ALGORITHM, f"the signature algorithm {report.signature_algorithm} is not known")
        return None
    endorsement = _choose(findings, report, certificates, wanted)
    if endorsement is None:
        return None
    if not _signed_by(report, endorsement.key):
        findings.refuse(Code.SIGNATURE, f"the report is not signed by the key in the {wanted} certificate")
        return None
    findings.claims["product"] = endorsement.product
    if not endorsement.not_before <= now <= endorsement.not_after:
        findings.refuse(
            Code.EXPIRED,
            f"the {wanted} certificate is valid from {endorsement.not_before:%Y-%m-%d} to "
            f"{endorsement.not_after:%Y-%m-%d}",
        )
    if report.product not in (None, endorsement.product) or (report.version >= 3 and report.product is None):
        findings.refuse(
            Code.CERTIFICATE,
            f"the report is of another CPU generation than the {endorsement.product} of its certificate",
        )
    if parse_tcb(report.reported_tcb, endorsement.product) != endorsement.tcb:
        findings.refuse(Code.CERTIFICATE, f"the {wanted} certificate is for another TCB version than the report's")
    if endorsement.vlek:
        findings.claims["provider"] = endorsement.provider
    elif not any(report.chip_id):
        # The host may hide the chip id (MASK_CHIP_ID): the key in the certificate is still that chip's own.
        findings.claims["chip_id"] = endorsement.chip_id.hex()
    elif report.chip_id != endorsement.chip_id:
        findings.refuse(Code.CERTIFICATE, "the VCEK certificate is of another chip than the report")
    findings.leave_unchecked(Code.REVOKED, "AMD's revocation lists were not looked at")
    return endorsement


def _choose(findings: Findings, report: SnpReport, certificates: Sequence[bytes], wanted: str) -> EndorsementKey | None:
    """The certificate to check against: the one that signed the report if there are several of its kind."""
    candidates: list[EndorsementKey] = []
    problems: list[str] = []
    for der in certificates:
        outcome = endorsement_key(der)
        if isinstance(outcome, str):
            problems.append(outcome)
        elif outcome.vlek == (wanted == "VLEK"):
            candidates.append(outcome)
    if not candidates:
        real = [problem for problem in problems if problem != "no VCEK or VLEK certificate"]
        if real:
            findings.refuse(Code.CHAIN, real[0])
        else:
            findings.refuse(
                Code.MISSING, f"the {wanted} certificate that signed the report is needed and was not given"
            )
        return None
    for candidate in candidates[1:] and candidates:
        if _signed_by(report, candidate.key):
            return candidate
    return candidates[0]


def _signed_by(report: SnpReport, key: ec.EllipticCurvePublicKey) -> bool:
    if any(report.signature_r[_COMPONENT_SIZE:] + report.signature_s[_COMPONENT_SIZE:] + report.signature_reserved):
        return False
    r = int.from_bytes(report.signature_r, "little")
    s = int.from_bytes(report.signature_s, "little")
    return _holds(report.raw[:_SIGNED_SIZE], r, s, key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))


# Kept: a broker looks at the same report when a session attests, and again at each key that it asks for.
@lru_cache(maxsize=512)
def _holds(signed: bytes, r: int, s: int, point: bytes) -> bool:
    """Whether the P-384 key at a point has signed."""
    key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(SHA384()))
    except InvalidSignature:
        return False
    return True


def _check_guest(findings: Findings, report: SnpReport, policy: EvidencePolicy) -> None:
    if report.debug and not policy.allow_debug:
        findings.refuse(Code.DEBUG, "the guest's policy allows debugging: its host can read its memory")
    if report.migration and not policy.allow_migration:
        findings.refuse(Code.MIGRATION, "the guest's policy allows migration to another machine by an agent")
    if report.vmpl > policy.max_vmpl:
        findings.refuse(
            Code.VMPL, f"the report was asked for from VMPL {report.vmpl}; at most {policy.max_vmpl} is allowed"
        )
    findings.require_one(Code.MEASUREMENT, "measurement", report.measurement, policy.measurements)
    findings.require_one(Code.HOST_DATA, "host data", report.host_data, policy.host_data, ask=False)
    signers = {report.id_key_digest}
    if report.key_info & _KEY_AUTHOR:
        signers.add(report.author_key_digest)
    # Zeros stand for none: a policy in which somebody copied them from a report must not mean every guest without one.
    signers.discard(bytes(len(report.id_key_digest)))
    if policy.signers and not signers & set(policy.signers):
        findings.refuse(
            Code.SIGNER, f"the guest's ID key {shorten(report.id_key_digest)} is not one that the policy allows"
        )
    if report.guest_svn < policy.min_svn:
        findings.refuse(Code.SVN, f"the guest's version (SVN) {report.guest_svn} is below the floor {policy.min_svn}")
    findings.require_absent(Code.PRODUCT, "product id", policy.product_ids)
    findings.require_absent(Code.RTMR, "run-time measurement registers", policy.rtmrs)
    findings.require_absent(Code.PCR, "PCRs", policy.pcrs)
    findings.require_absent(Code.NONCE, "nonce of a token", () if policy.nonce is None else (policy.nonce,))
    findings.require_absent(Code.ISSUER, "issuer", policy.issuers)


def _check_platform(
    findings: Findings, report: SnpReport, endorsement: EndorsementKey | None, policy: EvidencePolicy
) -> None:
    product = endorsement.product if endorsement is not None else report.product
    if product is not None:
        findings.claims |= {
            "product": product,
            "tcb": parse_tcb(report.reported_tcb, product).to_claim(),
            "committed_tcb": parse_tcb(report.committed_tcb, product).to_claim(),
            "launch_tcb": parse_tcb(report.launch_tcb, product).to_claim(),
        }
    # A host may hide the id, which is zeros then.
    if policy.chip_ids and findings.claims["chip_id"] not in {one.hex() for one in policy.chip_ids if any(one)}:
        findings.refuse(Code.CHIP, "the chip is not one that the policy allows")
    if not policy.tcb_floors:
        findings.leave_unchecked(Code.TCB, "the policy has no floor for the firmware's TCB version")
        return
    floors = [one for one in policy.tcb_floors if one.product in (None, product)]
    if product is None or not floors:
        findings.refuse(Code.TCB, f"the policy has no TCB floor for the CPU generation {product or 'of this report'}")
        return
    for what, raw in (("reported", report.reported_tcb), ("launch", report.launch_tcb)):
        if low := ", ".join(_below(parse_tcb(raw, product), floors)):
            findings.refuse(Code.TCB, f"the {what} TCB version is below the floor: {low}")


def _below(tcb: Tcb, floors: Sequence[SnpTcbFloor]) -> Iterator[str]:
    """What of it is too low, in words."""
    for name, number in tcb.to_claim().items():
        wanted = max(getattr(floor, name) for floor in floors)
        if number < wanted:
            yield f"{name} {number} < {wanted}"


#: Certificate table behind an extended report (GHCB specification, section 4.1.8.1): entries, the last one zero.
_ENTRY = struct.Struct("<16sII")
_MAX_ENTRIES = 16


def parse_certificate_table(data: bytes) -> tuple[bytes, ...]:
    """The certificates of a table as the hypervisor hands it over, in DER; the host may have put anything into it.

    Raises: FormatError where an entry points outside of the table, or there are more than 16.
    """
    certificates: list[bytes] = []
    for index in range(_MAX_ENTRIES + 1):
        at = index * _ENTRY.size
        if at == len(data):  # some hosts leave the closing entry out
            return tuple(certificates)
        if len(data) - at < _ENTRY.size:
            raise FormatError("the certificate table of an SNP report is cut short")
        guid, offset, length = _ENTRY.unpack_from(data, at)
        if not any(guid):
            return tuple(certificates)
        if offset + length > len(data):
            raise FormatError("the certificate table of an SNP report points outside of itself")
        certificates.append(data[offset : offset + length])
    raise FormatError(f"the certificate table of an SNP report has more than {_MAX_ENTRIES} entries")
