"""Whether a key is released: the one place that says yes. Evidence and policy in, a decision with its reasons out.

Nothing is read or written here but what is given; `handlers.py` brings both together in a transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from encfs.attestation.evidence import Evidence, EvidenceKind
from encfs.attestation.policy import EvidencePolicy
from encfs.attestation.verdict import Claims, Verdict
from encfs.attestation.verify import verify_evidence
from encfs.errors import EncfsError
from encfs.trust import KeyBinding
from imagetool.broker.endorsements import EndorsementStore
from imagetool.broker.policy import Policy, Rule
from imagetool.broker.state import KEY, Entry

#: Claims that the log keeps: who asked, and what a rule can ask about.
_LOGGED = frozenset(
    {
        *("measurement", "host_data", "signer", "svn", "product_id", "debug", "migration", "vmpl", "chip_id"),
        *("product", "tcb", "tcb_status", "fmspc", "attestation_key", "pcrs", "rtmrs"),
    }
)
#: TCB statuses that evidence may have to be looked at; a rule allows fewer.
_ALL_STATUSES = frozenset(
    {
        *("UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded"),
        *("OutOfDate", "OutOfDateConfigurationNeeded"),
    }
)


@dataclass(frozen=True, slots=True)
class Because:
    """One reason of a refusal: a stable code, and a sentence for the log."""

    code: str
    message: str

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message[:400]}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a consumer asks for: the path, and the content digest that it says it wants to open with the key."""

    path: str
    content_digest: str | None
    #: The version of that content, where `imagetool release` published it.
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """No reasons: released, with these refusals for the consumer to add to its own."""

    rule: Rule | None
    reasons: tuple[Because, ...]
    binding: KeyBinding = field(default_factory=KeyBinding)
    claims: Mapping[str, object] = field(default_factory=dict)

    @property
    def released(self) -> bool:
        return not self.reasons


def judge_genuineness(
    evidence: Evidence, report_data: bytes, policy: Policy, store: EndorsementStore, *, demo: bool, now: datetime
) -> Verdict:
    """Whether evidence is genuine and bound to its session, whatever it shows; what it shows is each rule's business.

    Raises: as `verify_evidence`.
    """
    base = EvidencePolicy(
        kinds=_without_sample(policy.kinds, demo=demo),
        report_data=report_data,
        allow_debug=True,
        allow_migration=True,
        max_vmpl=3,
        tcb_statuses=_ALL_STATUSES,
        allow_missing_collateral=True,
        attestation_keys=policy.attestation_keys,
    )
    return verify_evidence(evidence, base, endorsements=store.for_evidence(evidence), now=now)


def decide(
    wanted: Wanted,
    entry: Entry | None,
    rule: Rule | None,
    evidence: Evidence,
    report_data: bytes,
    store: EndorsementStore,
    *,
    demo: bool,
    now: datetime,
) -> Decision:
    """Everything but the count of releases. `entry` is None where the broker has no such key."""
    if rule is None:
        return Decision(None, (Because("no-rule", "no rule of the policy is for this key"),))
    asked = replace(rule.evidence, kinds=_without_sample(rule.evidence.kinds, demo=demo), report_data=report_data)
    try:
        verdict = verify_evidence(evidence, asked, endorsements=store.for_evidence(evidence), now=now)
    except EncfsError as error:
        return Decision(rule, (Because("evidence", error.message),))
    reasons = [Because(one.code.value, one.message) for one in verdict.reasons]
    if rule.expires is not None and now >= rule.expires:
        reasons.append(Because("expired", f"the rule is over since {rule.expires:%Y-%m-%dT%H:%M:%SZ}"))
    reasons += _about_content(wanted, rule)
    binding = KeyBinding()
    if entry is not None:
        binding = binding_of(entry, rule)
        reasons += _about_key(wanted, rule, entry, binding)
    return Decision(rule, tuple(reasons), binding, logged_claims(verdict.claims))


def binding_of(entry: Entry | None, rule: Rule | None) -> KeyBinding:
    """The refusals that go along with a key: those of its floor, and those of its rule."""
    sources = [one for one in (entry, rule) if one is not None]
    ids = [one.artifact_id for one in sources if one.artifact_id is not None]
    floors = [one.min_version for one in sources if one.min_version is not None]
    pins = rule.content_digests if rule is not None else ()
    return KeyBinding(artifact_id=next(iter(ids), None), min_version=max(floors, default=None), pins=pins)


def logged_claims(claims: Claims) -> dict[str, object]:
    """What of the claims goes into the log."""
    found: dict[str, object] = {}
    for name, value in claims.items():
        if name in _LOGGED:
            found[name] = dict(value) if isinstance(value, Mapping) else value
    return found


def _without_sample(kinds: frozenset[EvidenceKind], *, demo: bool) -> frozenset[EvidenceKind]:
    return kinds if demo else kinds - {EvidenceKind.SAMPLE}


def _about_content(wanted: Wanted, rule: Rule) -> list[Because]:
    if not rule.content_digests:
        return []
    if wanted.content_digest is None:
        return [Because("content-digest", "the request names no content digest, and the rule is for certain ones")]
    if wanted.content_digest not in rule.content_digests:
        return [Because("content-digest", f"the rule is not for the content {wanted.content_digest}")]
    return []


def _about_key(wanted: Wanted, rule: Rule, entry: Entry, binding: KeyBinding) -> list[Because]:
    if entry.kind != KEY and binding != KeyBinding():
        return [Because("opaque", "the resource is opaque, and cannot carry the refusals that its rule asks for")]
    if None not in (entry.artifact_id, rule.artifact_id) and entry.artifact_id != rule.artifact_id:
        return [Because("artifact-id", "the rule is for another artifact than the key's floor")]
    floor = binding.min_version
    if floor is not None and wanted.version is not None and wanted.version < floor:
        return [Because("floor", f"the content asked for is version {wanted.version}, below the floor {floor}")]
    return []
