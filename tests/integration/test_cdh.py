"""`cdh:` against a server of the shape of Confidential Containers' api-server-rest."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from encfs.errors import KeyFileError, KeyProviderError
from encfs.keys import jwk, jwkjson
from encfs.keys.jwk import generate_key
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import provider_from_uri
from encfs.keys.providers.cdh import CdhProvider
from encfs.keys.secrets import SymmetricKey
from tests.support.kbs_server import KbsServer, Reply, encoded, serving

DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))
KEK_TEXT = base64.b64encode(KEK).decode()


class Hub(KbsServer):
    """GET /cdh/resource/PATH gives the octets, 404 where the feature is off, 500 with text for a failure."""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply | None:
        self.asked.append(path)
        name = path.removeprefix("/cdh/resource/")
        if method == "GET" and name in self.resources:
            return 200, {}, self.resources[name]
        return (500, {}, b"rpc status: get resource failed") if self.resources else (404, {}, b"")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub(), None) as server:
        assert isinstance(server, Hub)
        yield server


def provider(hub: Hub, path: str = "default/key/model") -> CdhProvider:
    found = provider_from_uri(f"cdh:{path}?port={urlsplit(hub.url).port}")
    assert isinstance(found, CdhProvider)
    return found


def opened(provider: CdhProvider) -> bytes:
    keyring = create_keyring(b"secret", DIGEST, [SymmetricKey(bytearray(KEK))])
    return bytes(parse_keyring(keyring, DIGEST).open([provider]))


def test_the_hub_gives_the_key_once(hub: Hub) -> None:
    hub.resources["default/key/model"] = KEK
    one = provider(hub)
    assert opened(one) == opened(one) == b"secret"
    assert hub.asked == ["/cdh/resource/default/key/model"]
    assert one.fetch().kid == "kbs:///default/key/model"


def test_refusals_come_with_it(hub: Hub) -> None:
    hub.resources["default/key/model"] = encoded({"key": KEK_TEXT, "min_version": 7})
    one = provider(hub)
    assert opened(one) == b"secret"
    assert one.binding.min_version == 7


def test_a_feature_that_is_off(hub: Hub) -> None:
    with pytest.raises(KeyProviderError, match="status 404"):
        opened(provider(hub))


def test_a_failure_behind_the_hub(hub: Hub) -> None:
    hub.resources["another/key/model"] = KEK
    with pytest.raises(KeyProviderError, match="status 500"):
        opened(provider(hub))


@pytest.mark.parametrize("content", [b"", KEK[:31], b"{", b"\xff" * 40])
def test_no_key(hub: Hub, content: bytes) -> None:
    hub.resources["default/key/model"] = content
    with pytest.raises(KeyFileError, match="cdh:default/key/model"):
        opened(provider(hub))


def test_no_hub() -> None:
    with serving(Hub(), None) as gone:
        pass
    assert isinstance(gone, Hub)
    with pytest.raises(KeyProviderError, match="gives no answer"):
        opened(provider(gone))


@pytest.mark.parametrize("rest", ["", "a/b", "a/b/..", "a/b/c?port=0", "a/b/c?port=70000", "a/b/c?host=evil"])
def test_malformed_uris(rest: str) -> None:
    with pytest.raises(KeyFileError):
        CdhProvider(rest)


# Sealed secrets

SIGNER = ec.generate_private_key(ec.SECP256R1())
VAULT = {"version": "0.1.0", "type": "vault", "name": "kbs:///default/key/model", "provider": "kbs"}
SECRET = VAULT | {"provider_settings": {}, "annotations": {}}


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def sealed(payload: object = SECRET, *, signer: ec.EllipticCurvePrivateKey = SIGNER, **header: object) -> str:
    """As the project's own tool makes them."""
    head = {"alg": "ES256", "kid": "kbs:///default/signing/owner"} | header
    signed = f"{encode(encoded(head))}.{encode(encoded(payload))}"
    r, s = decode_dss_signature(signer.sign(signed.encode(), ec.ECDSA(SHA256())))
    return f"sealed.{signed}.{encode(r.to_bytes(32) + s.to_bytes(32))}"


def by_secret(hub: Hub, tmp_path: Path, text: str) -> CdhProvider:
    hub.resources |= {
        "default/key/model": KEK,
        "default/signing/owner": encoded(jwkjson.public_jwk(jwk.private_key(SIGNER).public)),
    }
    path = tmp_path / "secret"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return provider(hub, f"sealed={path}")


def test_a_sealed_secret(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(by_secret(hub, tmp_path, sealed())) == b"secret"
    assert hub.asked == ["/cdh/resource/default/signing/owner", "/cdh/resource/default/key/model"]
    # With a key of the guest's, and the broker's host in the name.
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "owner").write_bytes(encoded(jwkjson.public_jwk(jwk.private_key(SIGNER).public)))
    monkeypatch.setattr("encfs.keys.sealedsecret.CREDENTIALS", tmp_path / "credentials")
    named = SECRET | {"name": "kbs://kbs.example:8080/default/key/model"}
    assert opened(by_secret(hub, tmp_path, sealed(named, kid="owner"))) == b"secret"


def test_every_character_of_a_sealed_secret_counts(hub: Hub, tmp_path: Path) -> None:
    genuine = sealed()
    for at in range(len("sealed."), len(genuine), 7):
        changed = genuine[:at] + ("A" if genuine[at] != "A" else "B") + genuine[at + 1 :]
        one = by_secret(hub, tmp_path, changed)
        before = hub.asked.count("/cdh/resource/default/key/model")
        with pytest.raises((KeyFileError, KeyProviderError)):
            opened(one)
        assert hub.asked.count("/cdh/resource/default/key/model") == before, "nothing is fetched by what is not signed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (sealed(signer=ec.generate_private_key(ec.SECP256R1())), "is not signed by its key"),
        (sealed(alg="none"), "not one of ES256"),
        (sealed(alg="HS256"), "not one of ES256"),
        (sealed(kid=None), "with a kid"),
        (sealed(crit=["b64"]), "not one of ES256"),
        (sealed(kid="../../../etc/passwd"), "neither a resource nor the name of a key"),
        (sealed(kid="kbs:///one"), "is not a resource's path"),
        (sealed(SECRET | {"version": "0.2.0"}), "a version other than"),
        (sealed(SECRET | {"type": "other"}), "a type that is not known"),
        (sealed(SECRET | {"name": "/etc/shadow"}), "names something that is no resource"),
        (sealed(SECRET | {"name": 5}), "names something that is no resource"),
        (sealed(SECRET | {"provider": "aliyun"}), "opened by the hub alone"),
        (sealed(SECRET | {"type": "envelope", "provider": "aliyun", "key_id": "x"}), "opened by the hub alone"),
        ("sealed.a.b", "it is not sealed.HEADER"),
        ("fake.a.b.c", "it is not sealed.HEADER"),
        (sealed() + "=", "canonical base64url"),
    ],
)
def test_sealed_secrets_that_are_refused(hub: Hub, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises((KeyFileError, KeyProviderError), match=message):
        opened(by_secret(hub, tmp_path, text))
    assert "/cdh/resource/default/key/model" not in hub.asked


def test_a_key_of_another_kind_verifies_nothing(hub: Hub, tmp_path: Path) -> None:
    one = by_secret(hub, tmp_path, sealed())
    for key in (generate_key("ed25519"), generate_key("p384"), generate_key("oct")):
        hub.resources["default/signing/owner"] = encoded(
            jwkjson.private_jwk(key) if isinstance(key, SymmetricKey) else jwkjson.public_jwk(key.public)
        )
        with pytest.raises(KeyFileError):
            opened(one)
