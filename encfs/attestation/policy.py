"""What is asked of evidence. Data only; the checks are in `verify.py` and the modules of each kind.

A field that is left empty asks for nothing; a verdict then says under `unchecked` what it does not vouch for. A field
that is filled must hold: evidence that lacks what it asks about is refused. What weakens a guest (debugging, migration,
old firmware without any status) is refused unless a field allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from encfs.attestation.evidence import EvidenceKind

#: Every kind but `sample`.
GENUINE_KINDS = frozenset(EvidenceKind) - {EvidenceKind.SAMPLE}

_VIRTUAL_TPMS = frozenset({EvidenceKind.AZURE_SNP_VTPM, EvidenceKind.AZURE_TDX_VTPM})
# Kinds whose launched software may be named by who signed it.
_SIGNED = frozenset({EvidenceKind.SNP, EvidenceKind.SGX, EvidenceKind.AZURE_SNP_VTPM})


@dataclass(frozen=True, slots=True)
class SnpTcbFloor:
    """Lowest security version numbers of SNP firmware, each 0 to 255, for one CPU generation or (None) for any.

    `fmc` exists from Turin on.
    """

    product: str | None = None
    bootloader: int = 0
    tee: int = 0
    snp: int = 0
    microcode: int = 0
    fmc: int = 0


@dataclass(frozen=True, slots=True)
class EvidencePolicy:
    """What evidence must show. Tuples are alternatives: one of their values must be there; empty asks for nothing.

    All bytes are raw. Measurements are SNP's MEASUREMENT and TDX's MRTD (48 bytes) or SGX's MRENCLAVE (32).
    """

    kinds: frozenset[EvidenceKind] = GENUINE_KINDS
    measurements: tuple[bytes, ...] = ()
    #: SNP's ID key digest (48), SGX's MRSIGNER (32). Wants `product_ids` and `min_svn` beside it for SGX.
    signers: tuple[bytes, ...] = ()
    #: SGX's ISV product id.
    product_ids: tuple[int, ...] = ()
    #: SNP's guest SVN, SGX's ISV SVN.
    min_svn: int = 0
    #: SNP's HOST_DATA (32), TDX's MRCONFIGID (48).
    host_data: tuple[bytes, ...] = ()
    #: The fresh data the evidence must carry, up to 64 bytes, padded with zeros: compared with REPORT_DATA, or with the
    #: qualifying data of a TPM quote, which may also be its first 32 bytes.
    report_data: bytes | None = field(default=None, repr=False)
    #: The nonce that a token must carry.
    nonce: str | None = field(default=None, repr=False)

    allow_debug: bool = False
    allow_migration: bool = False
    #: Least privileged VMPL that may have asked for an SNP report (0 is the most privileged).
    max_vmpl: int = 0
    #: SNP: where any is given, all that fit the CPU generation must hold, and one must fit.
    tcb_floors: tuple[SnpTcbFloor, ...] = ()
    #: SNP: chips that are accepted, as in the report (64 bytes).
    chip_ids: tuple[bytes, ...] = ()

    #: TDX and SGX: statuses of the TCB, as Intel names them, that are accepted.
    tcb_statuses: frozenset[str] = frozenset({"UpToDate"})
    #: TDX and SGX: accept quotes without collateral, whose TCB status and revocation nobody has looked at.
    allow_missing_collateral: bool = False
    #: TDX: run-time measurement registers, 48 bytes each.
    rtmrs: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)

    #: TPM: values of PCRs of the SHA-256 bank, 32 bytes each.
    pcrs: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict)
    #: TPM: PCRs that an event log, where one is given, has to explain; None: all that were signed.
    event_log_pcrs: frozenset[int] | None = None
    #: TPM: enrolled attestation keys, SubjectPublicKeyInfo in DER. Quotes need one; it must be a restricted key.
    attestation_keys: tuple[bytes, ...] = ()

    #: Tokens: who may have issued them (`iss`); no other evidence meets this.
    issuers: tuple[str, ...] = ()
    #: Tokens: keys that may have signed them (SubjectPublicKeyInfo, DER), and authorities (certificates, DER) that may
    #: have issued the certificate in their `x5c`. One of both is needed.
    token_keys: tuple[bytes, ...] = ()
    token_authorities: tuple[bytes, ...] = ()

    #: Values that claims of the verdict must have, by name, where no field above is about them.
    claims: Mapping[str, tuple[str | int | bool, ...]] = field(default_factory=dict)

    def lacks_identity(self, kind: EvidenceKind) -> str | None:
        """What this policy must name so that evidence of a kind tells the owner's software from any other; else None.

        The host chooses HOST_DATA, MRCONFIGID and CONFIGID for any software, and any software extends RTMRs: all of
        them say something only beside what was launched. A virtual TPM is as good as the paravisor that was measured,
        and that is the same for all of Azure's customers. Only for kinds of hardware.
        """
        launched = bool(self.measurements or (self.signers and kind in _SIGNED))
        if kind in _VIRTUAL_TPMS:
            return None if launched and self.pcrs else "measurements (of the paravisor) and pcrs"
        if kind is EvidenceKind.TPM:
            return None if self.pcrs else "pcrs"
        return None if launched else "measurements or signers" if kind in _SIGNED else "measurements"
