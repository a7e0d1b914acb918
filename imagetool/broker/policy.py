"""The broker's policy: a TOML file with one table per key or prefix; docs/broker.md is its reference.

    [key."default/key/chat"]
    tee = "snp"
    measurements = ["…"]
    content_digests = ["sha256:…"]

    [key."default/key/*"]
    …

The rule for a path is the one with its name, else that with the longest prefix; rules are not merged, and what has no
rule is denied. Parsing is strict: a field that is misspelt must not become one that asks for nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from encfs.attestation.evidence import EvidenceKind
from encfs.attestation.kbs import TEE_NAMES
from encfs.attestation.policy import EvidencePolicy
from encfs.errors import FormatError
from encfs.kbs.protocol import parse_path
from encfs.kbs.resource import MAX_PINS
from encfs.strictjson import show_name
from imagetool.broker import policyfields

#: Largest policy, bytes.
MAX_POLICY_SIZE = 1 << 20
_MAX_RULES = 4096
_HINT = "docs/broker.md lists the fields of a rule"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key asks for. `pattern` is its path, or a prefix that ends in `*`."""

    pattern: str
    #: Of the evidence; without report data, which is each session's own.
    evidence: EvidencePolicy
    #: The artifact's content, where the request must name one of these.
    content_digests: tuple[str, ...] = ()
    artifact_id: str | None = None
    min_version: int | None = None
    expires: datetime | None = None
    #: How often the key is handed out.
    releases: int | None = None

    #: SHA-256 (hex) over what it asks for: keys at rest are bound to it. What has its default is left out, so that a
    #: later version with further fields opens them, too.
    digest: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        content = json.dumps(self.to_json(), sort_keys=True).encode()
        object.__setattr__(self, "digest", hashlib.sha256(content).hexdigest())

    def to_json(self) -> dict[str, object]:
        """What is asked for, without what has its default; bytes in hex."""
        found: dict[str, object] = {"pattern": self.pattern, "tee": sorted(str(kind) for kind in self.evidence.kinds)}
        default = EvidencePolicy()
        for one in fields(EvidencePolicy):
            value = getattr(self.evidence, one.name)
            if one.name != "kinds" and value != getattr(default, one.name):
                found[one.name] = _plain(value)
        for one in fields(Rule)[2:-1]:
            if (value := getattr(self, one.name)) != one.default:
                found[one.name] = _plain(value)
        return found


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules, by their patterns."""

    rules: Mapping[str, Rule]

    def rule_for(self, path: str) -> Rule | None:
        if (rule := self.rules.get(path)) is not None:
            return rule
        parts = path.split("/")
        for count in (2, 1, 0):
            if (rule := self.rules.get("/".join([*parts[:count], "*"]))) is not None:
                return rule
        return None

    @property
    def kinds(self) -> frozenset[EvidenceKind]:
        """Every kind of evidence that some rule accepts."""
        return frozenset(kind for rule in self.rules.values() for kind in rule.evidence.kinds)

    @property
    def attestation_keys(self) -> tuple[bytes, ...]:
        """Every attestation key that some rule names."""
        return tuple({key: None for rule in self.rules.values() for key in rule.evidence.attestation_keys})


class _FieldError(Exception):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def parse_policy(text: str, what: str = "the policy", *, judged: bool = True) -> Policy:
    """`what` names the file in messages. Not `judged`: rules that accept any software are let through, for replacing
    a policy that an earlier version accepted.

    Raises: FormatError naming the line and the field, for anything that is not known or not as it must be.
    """
    if len(text.encode()) > MAX_POLICY_SIZE:
        raise FormatError(f"{what} is larger than {MAX_POLICY_SIZE} bytes")
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FormatError(f"{what} is not TOML: {error}") from None
    except RecursionError:
        raise FormatError(f"{what} nests too deep") from None
    if unknown := set(document) - {"key"}:
        name = min(unknown)
        raise FormatError(f"{what}{_line(text, '', name)}: {show_name(name)} is not known", hint=_HINT)
    tables = document.get("key", {})
    if not isinstance(tables, dict) or len(tables) > _MAX_RULES:
        raise FormatError(f'{what}: key is not a table of rules, [key."REPOSITORY/TYPE/TAG"]', hint=_HINT)
    rules: dict[str, Rule] = {}
    for pattern, members in tables.items():
        try:
            rules[pattern] = _rule(pattern, members, judged=judged)
        except _FieldError as error:
            field = f" {error.field}" if error.field else ""
            raise FormatError(
                f"{what}{_line(text, pattern, error.field)}, [key.{json.dumps(pattern)[:200]}]{field}: {error}",
                hint=_HINT,
            ) from None
    return Policy(rules)


def _rule(pattern: str, members: object, *, judged: bool) -> Rule:
    _check_pattern(pattern)
    if not isinstance(members, dict):
        raise _FieldError("", "it is not a table")
    known = {policyfields.TEE_FIELD, policyfields.TCB_FIELD, *policyfields.EVIDENCE_FIELDS, *policyfields.RULE_FIELDS}
    if unknown := set(members) - known:
        raise _FieldError(min(unknown), "it is not known")
    if policyfields.TEE_FIELD not in members:
        raise _FieldError("", "it does not say which tee it accepts")
    kinds = _read(policyfields.TEE_FIELD, policyfields.read_kinds, members)
    asked: dict[str, Any] = {"kinds": frozenset(kinds)}
    for name, reader in policyfields.EVIDENCE_FIELDS.items():
        if name in members:
            asked[name] = _read(name, reader, members)
    if policyfields.TCB_FIELD in members:
        asked["tcb_floors"] = _read(policyfields.TCB_FIELD, policyfields.read_floors, members)
    more = {name: _read(name, reader, members) for name, reader in policyfields.RULE_FIELDS.items() if name in members}
    any_workload = more.pop("any_workload", False)
    evidence = EvidencePolicy(**asked)
    for kind in kinds:
        if not judged or any_workload or kind is EvidenceKind.SAMPLE:
            continue
        if wanted := evidence.lacks_identity(kind):
            raise _FieldError(
                "",
                f"it accepts any software of {TEE_NAMES[kind]}: name {wanted}, or any_workload = true if it is meant",
            )
    if EvidenceKind.TPM in kinds and not evidence.attestation_keys:
        raise _FieldError("", "a TPM is trusted by its attestation key: attestation_keys is needed")
    if len(more.get("content_digests", ())) > MAX_PINS:
        raise _FieldError("content_digests", f"it holds more than {MAX_PINS} digests")
    return Rule(pattern, evidence, **more)


def _check_pattern(pattern: str) -> None:
    parts = pattern.split("/")
    is_prefix = parts[-1] == "*" and len(parts) <= 3
    try:
        parse_path("/".join([*parts[:-1], *["x"] * (4 - len(parts))] if is_prefix else parts))
    except FormatError:
        raise _FieldError("", "it is no path REPOSITORY/TYPE/TAG, and no prefix of one that ends in /*") from None


def _read(name: str, reader: policyfields.Reader, members: Mapping[str, object]) -> Any:
    try:
        return reader(members[name])
    except FormatError as error:
        raise _FieldError(name, error.message) from None


def _line(text: str, pattern: str, field: str) -> str:
    """Where a field stands, as `, line N`; TOML's parser does not say, so it is looked for."""
    lines = text.splitlines()
    start = 0
    if pattern:
        start = next((index for index, line in enumerate(lines) if line.strip().startswith("[") and pattern in line), 0)
    if field:
        wanted = re.compile(rf"""\s*["']?{re.escape(field)}["']?\s*[.=]|\s*\[+\s*["']?{re.escape(field)}\b""")
        for index in range(start, len(lines)):
            if index > start and pattern and lines[index].lstrip().startswith("[key"):
                break
            if wanted.match(lines[index]):
                return f", line {index + 1}"
    return f", line {start + 1}" if lines else ""


def _plain(value: object) -> Any:
    """Any value of a rule as JSON has it, in one way."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in sorted(value.items())}
    if isinstance(value, frozenset):
        return sorted(_plain(one) for one in value)
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, str | int) or value is None:
        return value
    return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}  # type: ignore[arg-type]
