"""Evidence as data: its kinds, what comes along with it, the largest sizes accepted. Nothing is verified here."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class EvidenceKind(StrEnum):
    """The kinds of evidence that `verify.py` knows."""

    #: AMD SEV-SNP attestation report.
    SNP = "snp"
    #: Intel TDX quote.
    TDX = "tdx"
    #: Intel SGX quote (DCAP).
    SGX = "sgx"
    #: TPM 2.0 quote.
    TPM = "tpm"
    #: Quote of the virtual TPM of an Azure confidential VM, and the SNP report that vouches for that TPM.
    AZURE_SNP_VTPM = "azure-snp-vtpm"
    #: The same with a TDX quote.
    AZURE_TDX_VTPM = "azure-tdx-vtpm"
    #: Token of Microsoft Azure Attestation.
    MAA = "maa"
    #: Entity attestation result token (Trustee and other verifiers).
    EAR = "ear"
    #: Evidence for demonstrations: anyone can make it.
    SAMPLE = "sample"


#: Largest evidence of any kind, bytes.
MAX_EVIDENCE_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class Platform:
    """What Intel's collateral is of: the TEE, the family of platforms (FMSPC), the CA of their certificates.

    `kind` is SGX or TDX, `fmspc` 6 bytes, `ca` is `platform` or `processor`.
    """

    kind: EvidenceKind
    fmspc: bytes
    ca: str

    def __str__(self) -> str:
        return f"FMSPC {self.fmspc.hex()} ({self.kind}, {self.ca} CA)"


@dataclass(frozen=True, slots=True)
class Collateral:
    """Intel's collateral for quotes of one platform: `content` is the JSON of `dcap-qvl`, valid before `expires`."""

    platform: Platform
    content: bytes = field(repr=False)
    expires: datetime


@dataclass(frozen=True, slots=True)
class Endorsements:
    """What vouches for evidence and is itself checked against pinned roots: it need not come from a trusted source.

    `certificates` are X.509 in DER (a VCEK or VLEK; roots and intermediates are ignored), `collateral` is Intel's (TCB
    info, QE identity, CRLs and their issuers) for as many platforms as may be asked about, `event_log` what a TPM's
    firmware wrote down (`eventlog.py`), compared with the PCRs that the TPM signed.
    """

    certificates: tuple[bytes, ...] = ()
    collateral: tuple[Collateral, ...] = ()
    event_log: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Evidence:
    """One piece of evidence, of a kind that is known, with the endorsements that came along.

    `content` is what a file of evidence has in it: the report, the quote, the JSON document or the token.
    """

    kind: EvidenceKind
    content: bytes = field(repr=False)
    endorsements: Endorsements = field(default=Endorsements(), repr=False)
