"""The verdict on a piece of evidence: accepted or refused, why, and what the evidence says.

Data only; `verify.py` makes verdicts. `to_json` is the form that `docs/attestation.md` documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

#: Strings (bytes as lower-case hex), numbers, truth values, lists of strings, one level of named values (TCB, PCRs).
ClaimValue = str | int | bool | Sequence[str] | Mapping[str, str | int]

#: What the evidence says, by the names that docs/attestation.md lists. Proven only where the verdict accepts.
Claims = Mapping[str, ClaimValue]


class Code(StrEnum):
    """Stable names for why evidence is refused, or which check was left out."""

    #: The kind of evidence is not one that the policy accepts.
    KIND = "kind"
    #: A version or algorithm of the evidence that is not supported.
    UNSUPPORTED = "unsupported"
    #: Something that the verdict needs is not there: a certificate, collateral, a trusted key.
    MISSING = "missing"
    #: A signature does not verify.
    SIGNATURE = "signature"
    #: A signature algorithm that is not allowed for the key or kind.
    ALGORITHM = "algorithm"
    #: The attestation key of a TPM is not one that was enrolled.
    ATTESTATION_KEY = "attestation-key"
    #: The certificates do not lead to a trusted root.
    CHAIN = "chain"
    #: The certificate is genuine but of another chip, TCB version or CPU generation than the report.
    CERTIFICATE = "certificate"
    #: A certificate or issuer was revoked.
    REVOKED = "revoked"
    #: A certificate, token or collateral is no longer, or not yet, valid.
    EXPIRED = "expired"
    #: The collateral does not vouch for this quote.
    COLLATERAL = "collateral"
    #: The environment can be read by a debugger.
    DEBUG = "debug"
    #: The guest may be moved to another machine by a migration agent.
    MIGRATION = "migration"
    #: The privilege level (VMPL) from which the report was asked for is too low.
    VMPL = "vmpl"
    #: A TCB version is below its floor.
    TCB = "tcb"
    #: The TCB status that the vendor's collateral gives is not allowed.
    TCB_STATUS = "tcb-status"
    MEASUREMENT = "measurement"
    SIGNER = "signer"
    PRODUCT = "product"
    #: The security version number of the software is below its floor.
    SVN = "svn"
    HOST_DATA = "host-data"
    #: Fresh data (nonce, key) that the evidence must be bound to is not the expected.
    REPORT_DATA = "report-data"
    NONCE = "nonce"
    CHIP = "chip"
    #: A PCR, or the digest over them, is not the expected one.
    PCR = "pcr"
    RTMR = "rtmr"
    EVENT_LOG = "event-log"
    #: Two parts of composed evidence do not belong together.
    BINDING = "binding"
    ISSUER = "issuer"
    #: The result of another verifier, in a token, is not an acceptable one.
    STATUS = "status"
    #: A claim is not one of the values that the policy asks for.
    CLAIM = "claim"
    #: Evidence for demonstrations, which proves nothing.
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why evidence is refused, or what was not checked: a stable code, and a sentence for people."""

    code: Code
    message: str

    def to_json(self) -> dict[str, str]:
        return {"code": self.code.value, "message": self.message}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out of verifying a piece of evidence.

    `reasons` are why it is refused: every one that was found, and none exactly when it is accepted. `unchecked` is what
    an accepting verdict does not vouch for, such as a measurement that the policy says nothing about.
    """

    kind: str
    accepted: bool
    reasons: tuple[Reason, ...]
    claims: Claims = field(default_factory=dict)
    unchecked: tuple[Reason, ...] = ()

    def __post_init__(self) -> None:
        if self.accepted == bool(self.reasons):
            raise ValueError("a verdict has reasons exactly when it refuses")

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of `reasons`, in order."""
        return tuple(reason.code.value for reason in self.reasons)

    def to_json(self) -> dict[str, object]:
        return {
            "kind": str(self.kind),
            "accepted": self.accepted,
            "reasons": [reason.to_json() for reason in self.reasons],
            "unchecked": [reason.to_json() for reason in self.unchecked],
            "claims": {name: _plain(value) for name, value in self.claims.items()},
        }


def _plain(value: ClaimValue) -> object:
    if isinstance(value, str | int):
        return value
    return dict(value) if isinstance(value, Mapping) else list(value)
