"""The encryption of resources, judged by another JOSE implementation; and what came with a key."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
from jwcrypto import jwe as peer_jwe
from jwcrypto import jwk as peer_jwk

from encfs.errors import FormatError, IntegrityError, PinError, RollbackError, WrongIdError
from encfs.kbs import jwe
from encfs.kbs.protocol import parse_path
from encfs.kbs.resource import parse_resource, resource_document
from encfs.keys.jwk import PrivateKey, generate_key
from encfs.keys.jwkjson import private_jwk
from encfs.trust import KeyBinding, check_binding

DIGEST, OTHER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def session(kind: str) -> PrivateKey:
    key = generate_key(kind)
    assert isinstance(key, PrivateKey)
    return key


def parsed(key: PrivateKey) -> jwe.SessionKey:
    return jwe.parse_public(jwe.public_members(key.public))


@pytest.mark.parametrize("kind", ["p256", "p384", "rsa3072"])
def test_another_implementation_decrypts_what_we_encrypt(kind: str) -> None:
    key = session(kind)
    document = jwe.encrypt(b"resource", parsed(key))
    token = peer_jwe.JWE()
    token.deserialize(json.dumps(document), peer_jwk.JWK(**private_jwk(key)))
    assert token.payload == b"resource"
    assert bytes(jwe.decrypt(document, key)) == b"resource"


def test_another_session_opens_nothing() -> None:
    document = jwe.encrypt(b"resource", parsed(session("p256")))
    with pytest.raises(IntegrityError, match="not for this session"):
        jwe.decrypt(document, session("p256"))


def test_a_private_key_is_no_session_key() -> None:
    members = private_jwk(session("p256")) | {"alg": "ECDH-ES+A256KW"}
    members.pop("kid")
    with pytest.raises(FormatError, match="members"):
        jwe.parse_public(members)


def p521() -> tuple[peer_jwk.JWK, dict[str, str]]:
    """A session key of another implementation's, and its public half as clients send it."""
    key = peer_jwk.JWK.generate(kty="EC", crv="P-521")
    return key, {name: str(key.export_public(as_dict=True)[name]) for name in ("kty", "crv", "x", "y")} | {
        "alg": "ECDH-ES+A256KW"
    }


def test_session_keys_on_p521() -> None:
    for _ in range(8):
        key, members = p521()
        document = jwe.encrypt(b"resource", jwe.parse_public(members))
        token = peer_jwe.JWE()
        token.deserialize(json.dumps(document), key)
        assert token.payload == b"resource"
        header = json.loads(base64.urlsafe_b64decode(document["protected"] + "=="))
        # Coordinates always have their 66 bytes (RFC 7518, section 6.2.1.2), and the wrapped key its 40.
        assert set(header) == {"alg", "enc", "epk"}
        assert (header["alg"], header["enc"], header["epk"]["crv"]) == ("ECDH-ES+A256KW", "A256GCM", "P-521")
        assert [len(base64.urlsafe_b64decode(header["epk"][name])) for name in "xy"] == [66, 66]
        assert len(base64.urlsafe_b64decode(document["encrypted_key"] + "==")) == 40


def _shortened(members: dict[str, str]) -> str:
    return base64.urlsafe_b64encode(base64.urlsafe_b64decode(members["x"])[1:]).decode().rstrip("=")


@pytest.mark.parametrize(
    "change",
    [
        lambda members: {"x": members["y"]},
        lambda members: {"x": _shortened(members)},
        lambda members: {"x": ""},
        lambda members: {"y": members["y"] + "="},
        lambda members: {"kty": "OKP"},
        lambda members: {"alg": "RSA-OAEP-256"},
        lambda members: {"alg": "ECDH-ES"},
        lambda members: {"d": members["x"]},
        lambda members: {"kid": "mine"},
        lambda members: {"crv": "P-256"},
        lambda members: {"crv": "P-384"},
        lambda members: {"crv": "secp521r1"},
    ],
)
def test_malformed_session_keys_on_p521(change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    _, members = p521()
    with pytest.raises(FormatError, match="tee-pubkey"):
        jwe.parse_public(members | change(members))
    del members["y"]
    with pytest.raises(FormatError, match="tee-pubkey"):
        jwe.parse_public(members)


@pytest.mark.parametrize("members", [None, [], {}, {"kty": "EC"}, {"alg": "RSA1_5"}, {"alg": "ECDH-ES+A256KW"}])
def test_malformed_session_keys(members: object) -> None:
    with pytest.raises(FormatError, match="tee-pubkey"):
        jwe.parse_public(members)


@pytest.mark.parametrize("path", ["", "a/b", "a/b/c/d", "../b/c", "a//c", "a/b/c?d", "a/b/ c", "a/b/" + "c" * 200])
def test_malformed_paths(path: str) -> None:
    with pytest.raises(FormatError, match="not a resource's path"):
        parse_path(path)


def test_refusals_travel_with_a_key() -> None:
    binding = KeyBinding(artifact_id="acme/chat", min_version=3, pins=(DIGEST,))
    released = parse_resource(resource_document(bytes(32), binding), "it")
    assert released.binding == binding
    assert "0" * 8 not in repr(released)


@pytest.mark.parametrize(
    ("binding", "error"),
    [
        (KeyBinding(pins=(OTHER,)), PinError),
        (KeyBinding(artifact_id="acme/other"), WrongIdError),
        (KeyBinding(min_version=4), RollbackError),
    ],
)
def test_what_came_with_a_key_refuses(binding: KeyBinding, error: type[Exception]) -> None:
    with pytest.raises(error, match="kbs:///a/b/c"):
        check_binding(binding, content_digest=DIGEST, artifact_id="acme/chat", version=3, key_name="kbs:///a/b/c")


def test_what_it_allows() -> None:
    for binding in (KeyBinding(), KeyBinding(artifact_id="acme/chat", min_version=3, pins=(OTHER, DIGEST))):
        check_binding(binding, content_digest=DIGEST, artifact_id="acme/chat", version=3, key_name="k")


def test_the_protected_header_is_as_other_clients_write_it_anew() -> None:
    key = jwe.session_key()
    made = jwe.encrypt(b"content", parsed(key))["protected"]
    header = json.loads(base64.urlsafe_b64decode(made + "=" * (-len(made) % 4)))
    assert list(header) == ["alg", "enc", "epk"]
    assert list(header["epk"]) == sorted(header["epk"])
    again = json.dumps(header, separators=(",", ":")).encode()
    assert base64.urlsafe_b64encode(again).rstrip(b"=").decode() == made
