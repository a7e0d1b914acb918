"""Keys for tests, generated once per process: one of every kind, and a second one of each to be the wrong key."""

from __future__ import annotations

import functools

from encfs.keys.jwk import GENERATED_TYPES, PrivateKey, PublicKey, generate_key
from encfs.keys.secrets import SymmetricKey

ENCRYPTING = ("x25519", "p256", "p384", "rsa3072", "mlkem768x25519", "oct")
SIGNING = ("ed25519", "p256", "mldsa65")
DIGEST = "sha256:" + "5a" * 32
OTHER_DIGEST = "sha256:" + "a5" * 32

assert {*ENCRYPTING, *SIGNING} == set(GENERATED_TYPES)


def key(kind: str, number: int = 0) -> PrivateKey | SymmetricKey:
    """The key of a kind; another `number` gives another key. Symmetric keys are not to be wiped."""
    return _generate(kind, number)


@functools.cache
def _generate(kind: str, number: int) -> PrivateKey | SymmetricKey:
    return generate_key(kind)


def private(kind: str, number: int = 0) -> PrivateKey:
    found = key(kind, number)
    assert isinstance(found, PrivateKey)
    return found


def public(kind: str, number: int = 0) -> PublicKey:
    return private(kind, number).public


def recipient(kind: str, number: int = 0) -> PublicKey | SymmetricKey:
    found = key(kind, number)
    return found.public if isinstance(found, PrivateKey) else found
