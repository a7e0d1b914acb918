"""Each reason to refuse an artifact has an exception and an exit code of its own, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from encfs.artifact import open_artifact
from encfs.errors import (
    EncfsError,
    IntegrityError,
    MissingKeyError,
    PinError,
    RollbackError,
    UnsignedError,
    WrongIdError,
    WrongKeyError,
    WrongSignerError,
)
from encfs.keys.files import write_key_files
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.keys.providers import KeyProvider, provider_from_uri
from encfs.trust import TrustPolicy
from tests.support.artifacts import ARTIFACT_ID, make_keys, make_small_tree
from tests.support.hostile import Victim, make_victim
from tests.support.memory import MemoryStore


@dataclass(frozen=True, slots=True)
class Scene:
    """A signed artifact of version 5, the same unsigned, and a key that has nothing to do with it."""

    victim: Victim
    unsigned: MemoryStore
    other_signer: PrivateKey
    other_provider: KeyProvider

    def trust(self, **changed: object) -> TrustPolicy:
        options: dict[str, object] = {
            "keys": (self.victim.keys.verifier,),
            "artifact_id": ARTIFACT_ID,
            "min_version": 5,
            **changed,
        }
        return TrustPolicy(**options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    directory = tmp_path_factory.mktemp("scene")
    victim = make_victim(make_small_tree(directory / "tree"), make_keys(directory), version=5)
    signer, recipient = generate_key("ed25519"), generate_key("x25519")
    assert isinstance(signer, PrivateKey)
    write_key_files(recipient, directory / "other.jwk")
    other = provider_from_uri(str(directory / "other.jwk"))
    return Scene(victim, victim.with_documents(signatures=[]), signer, other)


Attempt = tuple[MemoryStore, list[KeyProvider], TrustPolicy]

REFUSALS: dict[str, tuple[type[EncfsError], int, Callable[[Scene], Attempt]]] = {
    "missing key": (MissingKeyError, 21, lambda s: (s.victim.store, [], s.trust())),
    "wrong key": (WrongKeyError, 22, lambda s: (s.victim.store, [s.other_provider], s.trust())),
    "unsigned": (UnsignedError, 30, lambda s: (s.unsigned, [s.victim.provider], s.trust())),
    "nothing trusted": (UnsignedError, 30, lambda s: (s.victim.store, [s.victim.provider], TrustPolicy())),
    "wrong signer": (
        WrongSignerError,
        31,
        lambda s: (s.victim.store, [s.victim.provider], s.trust(keys=(s.other_signer.public,))),
    ),
    "wrong id": (WrongIdError, 32, lambda s: (s.victim.store, [s.victim.provider], s.trust(artifact_id="acme/other"))),
    "below the floor": (RollbackError, 33, lambda s: (s.victim.store, [s.victim.provider], s.trust(min_version=6))),
    "wrong pin": (
        PinError,
        34,
        lambda s: (s.victim.store, [s.victim.provider], TrustPolicy(pin=f"sha256:{'0' * 64}")),
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_reason_has_its_own_error_and_says_what_to_do(scene: Scene, reason: str) -> None:
    kind, exit_code, attempt = REFUSALS[reason]
    store, keys, trust = attempt(scene)
    with pytest.raises(EncfsError) as caught:
        open_artifact(store, keys=keys, trust=trust)
    assert type(caught.value) is kind
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_exit_codes_are_distinct() -> None:
    assert len({exit_code for _, exit_code, _ in REFUSALS.values()}) == 7


def test_the_scene_is_readable_with_everything_right(scene: Scene) -> None:
    with open_artifact(scene.victim.store, keys=[scene.victim.provider], trust=scene.trust()) as artifact:
        assert artifact.origin.signer == scene.victim.keys.verifier.kid
        assert bytes(artifact.volumes[0].read(0, 1 << 30)) == scene.victim.plaintext


def test_wrong_keys_beside_the_right_one_do_no_harm(scene: Scene) -> None:
    keys = [scene.other_provider, scene.victim.provider]
    open_artifact(scene.victim.store, keys=keys, trust=scene.trust()).close()


def test_the_wrong_key_is_named_with_what_it_was_tried_on(scene: Scene) -> None:
    with pytest.raises(WrongKeyError) as caught:
        open_artifact(scene.victim.store, keys=[scene.other_provider], trust=scene.trust())
    assert "other.jwk" in caught.value.message
    assert "1 x25519" in caught.value.message


def test_trust_comes_before_keys(scene: Scene) -> None:
    """A key provider is not even asked where the origin is refused: it may be a broker that logs a release."""

    class Untouchable:
        uri = "test:"

        def unwrap(self, recipients: object, content_digest: str) -> bytearray:
            raise AssertionError("asked for a key")

        def close(self) -> None:
            return

    for reason in ("unsigned", "nothing trusted", "wrong signer", "wrong id", "below the floor", "wrong pin"):
        kind, _, attempt = REFUSALS[reason]
        store, _, trust = attempt(scene)
        with pytest.raises(kind):
            open_artifact(store, keys=[Untouchable()], trust=trust)


def test_allow_unsigned_takes_no_other_condition_back(scene: Scene) -> None:
    refusals: list[tuple[dict[str, object], type[EncfsError]]] = [
        ({"keys": (scene.other_signer.public,)}, WrongSignerError),
        ({"artifact_id": "acme/other"}, WrongIdError),
        ({"min_version": 6}, RollbackError),
        ({"pin": f"sha256:{'0' * 64}"}, PinError),
    ]
    for changed, kind in refusals:
        trust = scene.trust(allow_unsigned=True, **changed)
        with pytest.raises(kind):
            open_artifact(scene.victim.store, keys=[scene.victim.provider], trust=trust)


def test_a_pin_vouches_without_a_signature_and_against_a_changed_descriptor(scene: Scene, tmp_path: Path) -> None:
    pin = TrustPolicy(pin=scene.victim.content.digest)
    with open_artifact(scene.unsigned, keys=[scene.victim.provider], trust=pin) as artifact:
        assert artifact.origin.pinned
    other = make_victim(make_small_tree(tmp_path / "tree"), scene.victim.keys, version=5)
    with pytest.raises(PinError):
        open_artifact(other.store, keys=[other.provider], trust=pin)


def test_what_is_signed_but_damaged_is_told_from_what_is_not_trusted(scene: Scene) -> None:
    blob = bytearray(scene.victim.blob(scene.victim.segment_digest))
    blob[-1] ^= 1
    damaged = scene.victim.with_blob(scene.victim.segment_digest, bytes(blob))
    with (
        open_artifact(damaged, keys=[scene.victim.provider], trust=scene.trust()) as artifact,
        pytest.raises(IntegrityError) as caught,
    ):
        artifact.volumes[0].read(0, 1)
    assert caught.value.exit_code == 11
