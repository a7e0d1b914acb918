"""What a verifier finds while it looks at evidence; it becomes the verdict."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterable

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import ClaimValue, Code, Reason, Verdict

# Fields of a policy that ask for something not every kind of evidence has; the values that ask for nothing.
_ASKED = (
    ("measurements", Code.MEASUREMENT, "measurement"),
    ("signers", Code.SIGNER, "signer"),
    ("product_ids", Code.PRODUCT, "product id"),
    ("min_svn", Code.SVN, "version (SVN)"),
    ("host_data", Code.HOST_DATA, "host data"),
    ("chip_ids", Code.CHIP, "chip id"),
    ("tcb_floors", Code.TCB, "SNP firmware versions"),
    ("rtmrs", Code.RTMR, "run-time measurement registers"),
    ("pcrs", Code.PCR, "PCRs"),
    ("nonce", Code.NONCE, "nonce of a token"),
    ("issuers", Code.ISSUER, "issuer"),
)
_NOTHING: tuple[object, ...] = ((), {}, 0, None)


class Findings:
    """Refusals, checks left out, and claims, in the order in which they were found."""

    def __init__(self) -> None:
        self.claims: dict[str, ClaimValue] = {}
        self._refusals: list[Reason] = []
        self._unchecked: list[Reason] = []

    def refuse(self, code: Code, message: str) -> None:
        self._refusals.append(Reason(code, message))

    def leave_unchecked(self, code: Code, message: str) -> None:
        self._unchecked.append(Reason(code, message))

    @property
    def refused(self) -> bool:
        return bool(self._refusals)

    def require_one(self, code: Code, what: str, value: bytes, allowed: Collection[bytes], *, ask: bool = True) -> None:
        """`value` must be among the allowed; where none are given it is unchecked (and said to be, with `ask`)."""
        if not allowed:
            if ask:
                self.leave_unchecked(code, f"the policy does not say which {what} is expected")
        elif value not in allowed:
            self.refuse(code, f"the {what} {shorten(value)} is not one that the policy allows")

    def require_absent(self, code: Code, what: str, wanted: Iterable[object]) -> None:
        """For what this kind of evidence does not have: a policy that asks about it is not met."""
        if any(True for _ in wanted):
            self.refuse(code, f"this kind of evidence has no {what}, which the policy asks about")

    def require_nothing_else(self, policy: EvidencePolicy, about: Collection[str]) -> None:
        """What a policy asks about and this kind of evidence has not; `about` names the fields that it has."""
        for name, code, what in _ASKED:
            if name not in about:
                asked = getattr(policy, name)
                self.require_absent(code, what, () if asked in _NOTHING else (asked,))

    def require_report_data(self, field: bytes, expected: bytes | None) -> None:
        """A field of fixed length must carry the expected data, padded with zeros."""
        if expected is None:
            self.leave_unchecked(Code.REPORT_DATA, "the policy gives no report data: the evidence may be an old one")
        elif len(expected) > len(field) or not hmac.compare_digest(field, expected.ljust(len(field), b"\0")):
            self.refuse(Code.REPORT_DATA, "the report data is not the expected: evidence of another session or key")

    def require_claims(self, policy: EvidencePolicy) -> None:
        """The claims that the policy names by themselves."""
        for name, allowed in policy.claims.items():
            value = self.claims.get(name)
            # True == 1 in Python, and a claim that is a number is no truth value.
            if not any(type(value) is type(one) and value == one for one in allowed):
                self.refuse(Code.CLAIM, f"the claim {name} is not one of the values that the policy allows")

    def verdict(self, kind: EvidenceKind) -> Verdict:
        return Verdict(kind, not self._refusals, tuple(self._refusals), self.claims, tuple(self._unchecked))


def shorten(value: bytes) -> str:
    """Hex for a message, cut short."""
    text = value.hex()
    return text if len(text) <= 24 else text[:16] + "…"
