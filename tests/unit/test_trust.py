"""The rules of trust: every combination of options against every state of an artifact."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from encfs.encoding import sha256_digest
from encfs.errors import (
    EncfsError,
    FormatError,
    KeyFileError,
    PinError,
    RollbackError,
    TrustError,
    UnsignedError,
    UsageError,
    WrongIdError,
    WrongSignerError,
)
from encfs.signatures import sign
from encfs.trust import Origin, TrustPolicy, check_trust, parse_pin
from tests.support.keys import private, public

CONTENT = b'{"format":"encfs/1","id":"model","version":5}'
DIGEST = sha256_digest(CONTENT)
OTHER = sha256_digest(b"other")
SIGNED = [sign(CONTENT, private("ed25519"))]
TRUSTED = (public("ed25519"),)


def check(
    policy: TrustPolicy, envelopes: list[bytes] | None = None, artifact_id: str = "model", version: int = 5
) -> Origin:
    return check_trust(CONTENT, artifact_id, version, SIGNED if envelopes is None else envelopes, policy)


def test_pinned() -> None:
    origin = check(TrustPolicy(pin=DIGEST), [])
    assert origin == Origin(DIGEST, pinned=True, signer=None, warnings=())
    assert origin.proven
    assert str(origin) == "pinned"


def test_signed() -> None:
    origin = check(TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=5))
    assert origin == Origin(DIGEST, pinned=False, signer=public("ed25519").kid, warnings=())
    assert origin.proven
    assert str(origin) == f"signed by {public('ed25519').kid}"


def test_without_a_floor_there_is_a_warning() -> None:
    origin = check(TrustPolicy(keys=TRUSTED, artifact_id="model"))
    assert origin.signer == public("ed25519").kid
    assert len(origin.warnings) == 1
    assert "--min-version" in origin.warnings[0]
    # What is pinned cannot be rolled back.
    assert check(TrustPolicy(pin=DIGEST, keys=TRUSTED, artifact_id="model")).warnings == ()


def test_unsigned_only_when_asked() -> None:
    with pytest.raises(UnsignedError) as caught:
        check(TrustPolicy())
    assert caught.value.exit_code == 30
    assert caught.value.hint is not None
    for option in ("--pin sha256:", "--trust KEY with --id NAME", "--allow-unsigned"):
        assert option in caught.value.hint
    origin = check(TrustPolicy(allow_unsigned=True), [])
    assert not origin.proven
    assert str(origin) == "unproven"
    assert "not proven" in origin.warnings[0]


def test_a_signature_proves_nothing_without_a_trusted_key() -> None:
    with pytest.raises(UnsignedError, match="nothing was given that proves"):
        check(TrustPolicy(), SIGNED)
    assert check(TrustPolicy(allow_unsigned=True), SIGNED).signer is None


def test_distinct_errors() -> None:
    policy = TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=5)
    cases: list[tuple[type[EncfsError], int, dict[str, Any]]] = [
        (UnsignedError, 30, {"envelopes": []}),
        (WrongSignerError, 31, {"envelopes": [sign(CONTENT, private("ed25519", 1))]}),
        (WrongIdError, 32, {"artifact_id": "another"}),
        (RollbackError, 33, {"version": 4}),
    ]
    for kind, code, changes in cases:
        with pytest.raises(kind) as caught:
            check(policy, **changes)
        assert type(caught.value) is kind
        assert caught.value.exit_code == code
        assert caught.value.hint
        assert "\n" not in str(caught.value)
    with pytest.raises(PinError, match=f"content digest is {DIGEST}, not the pinned {OTHER}") as pin:
        check(TrustPolicy(pin=OTHER))
    assert pin.value.exit_code == 34


def test_the_signature_must_be_over_this_content() -> None:
    policy = TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=0)
    with pytest.raises(WrongSignerError):
        check(policy, [sign(b"other", private("ed25519"))])


def test_ids_are_compared_exactly_and_shown_safely() -> None:
    policy = TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=0)
    for other in ("Model", "model ", "", "modél", "\u202eledom\n" * 100):
        with pytest.raises(WrongIdError) as caught:
            check(policy, artifact_id=other)
        assert "\n" not in str(caught.value)
        assert str(caught.value).isascii()
        assert len(str(caught.value)) < 400


def test_versions_at_the_floor() -> None:
    policy = TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=7)
    assert check(policy, version=7).proven
    assert check(policy, version=2**53 - 1).proven
    with pytest.raises(RollbackError, match="version 6 is below the floor 7"):
        check(policy, version=6)


def test_malformed_signatures_are_reported() -> None:
    origin = check(TrustPolicy(keys=TRUSTED, artifact_id="model", min_version=0), [b"junk", *SIGNED])
    assert origin.proven
    assert len(origin.warnings) == 1
    assert origin.warnings[0].startswith("signature 0 is ignored")
    with pytest.raises(FormatError, match="17 signatures"):
        check(TrustPolicy(keys=TRUSTED, artifact_id="model"), SIGNED * 17)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"keys": TRUSTED}, "without the artifact's id.*add --id NAME"),
        ({"keys": TRUSTED, "pin": DIGEST}, "without the artifact's id"),
        ({"keys": TRUSTED, "allow_unsigned": True}, "without the artifact's id"),
        ({"keys": TRUSTED, "min_version": 1}, "without the artifact's id"),
        ({"artifact_id": "model"}, "proves nothing by itself"),
        ({"min_version": 0}, "proves nothing by itself"),
        ({"artifact_id": "model", "min_version": 0}, "proves nothing by itself"),
        ({"pin": ""}, "the pin is not of the form"),
        ({"pin": DIGEST.upper()}, "the pin is not of the form"),
        ({"pin": DIGEST[7:]}, "the pin is not of the form"),
        ({"pin": DIGEST + "\n"}, "the pin is not of the form"),
        ({"pin": DIGEST, "min_version": -1}, "floor -1 is not between"),
        ({"pin": DIGEST, "min_version": 2**53}, "is not between"),
    ],
)
def test_usage_errors(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        TrustPolicy(**options)
    assert caught.value.exit_code == 2


def test_keys_that_sign_nothing() -> None:
    with pytest.raises(KeyFileError, match="cannot sign"):
        TrustPolicy(keys=(public("x25519"),), artifact_id="model")


def test_pins() -> None:
    assert parse_pin(DIGEST) == DIGEST
    with pytest.raises(UsageError, match="content_digest"):
        parse_pin("latest")


# --- every combination -----------------------------------------------------------------------------------------------

PINS = (None, DIGEST, OTHER)
KEYS = ((), TRUSTED, (public("ed25519", 1),))
IDS = (None, "model", "another")
FLOORS = (None, 5, 6)


def _policy(options: tuple[Any, ...]) -> TrustPolicy | None:
    pin, keys, artifact_id, floor, allow = options
    try:
        return TrustPolicy(pin=pin, keys=keys, artifact_id=artifact_id, min_version=floor, allow_unsigned=allow)
    except UsageError:
        return None


def _accepted(policy: TrustPolicy, envelopes: list[bytes]) -> bool:
    try:
        check(policy, envelopes)
    except TrustError:
        return False
    return True


@pytest.mark.parametrize("envelopes", [[], SIGNED], ids=["unsigned", "signed"])
def test_everything_given_must_hold_and_something_must_vouch(envelopes: list[bytes]) -> None:
    seen = {True: 0, False: 0}
    for options in itertools.product(PINS, KEYS, IDS, FLOORS, (False, True)):
        policy = _policy(options)
        if policy is None:
            continue
        pin, keys, artifact_id, floor, allow = options
        holds = (
            pin in (None, DIGEST)
            and (not keys or (keys == TRUSTED and bool(envelopes)))
            and artifact_id in (None, "model")
            and floor in (None, 5)
        )
        vouched = pin is not None or bool(keys) or allow
        accepted = _accepted(policy, envelopes)
        assert accepted == (holds and vouched), options
        seen[accepted] += 1
    assert min(seen.values()) > 10


@pytest.mark.parametrize("envelopes", [[], SIGNED], ids=["unsigned", "signed"])
def test_options_only_add_refusals(envelopes: list[bytes]) -> None:
    """Taking any option but --allow-unsigned away never turns an acceptance with it into a refusal for its own sake."""
    for options in itertools.product(PINS, KEYS, IDS, FLOORS, (False, True)):
        policy = _policy(options)
        if policy is None or not _accepted(policy, envelopes):
            continue
        pin, keys, artifact_id, floor, _ = options
        for weaker in (
            (None, keys, artifact_id, floor, True),
            (pin, (), None, None, True),
            (pin, keys, artifact_id, None, True),
        ):
            relaxed = _policy(weaker)
            assert relaxed is not None
            assert _accepted(relaxed, envelopes), (options, weaker)
