"""`cdh:` against a server of the shape of Confidential Containers' api-server-rest."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
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
        (sealed(SECRET | {"name": 5}), "has no text name"),
        (sealed(SECRET | {"type": ["vault"]}), "a type that is not known"),
        (sealed({name: value for name, value in SECRET.items() if name != "provider"}), "has no text provider"),
        (sealed(SECRET | {"type": "envelope", "provider": "aliyun", "key_id": "x"}), "has no text encrypted_key"),
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


# What the hub unseals itself: over its socket, the envelope decrypted by the provider's key as the specification has it


class HubSocket(threading.Thread):
    """The hub's ttrpc side: GetResource, and UnsealSecret with a KMS of its own (`kms`: RSA-OAEP under SHA-256)."""

    def __init__(self, path: Path, resources: dict[str, bytes], kms: rsa.RSAPrivateKey) -> None:
        super().__init__(daemon=True)
        self.resources, self.kms, self.asked = resources, kms, []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(4)

    asked: list[str]

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                size, stream, kind, _ = struct.unpack(">IIBB", connection.recv(10, socket.MSG_WAITALL))
                fields = dict(_fields(connection.recv(size, socket.MSG_WAITALL)))
                assert (kind, stream) == (1, 1)
                service, method = bytes(fields[1]).decode(), bytes(fields[2]).decode()
                self.asked.append(method)
                content = bytes(dict(_fields(bytes(fields[3])))[1])
                try:
                    found = self.answer(f"{service}/{method}", content)
                    message = _field(2, _field(1, found))
                except (ValueError, KeyError, InvalidTag) as error:
                    message = _field(1, b"\x08\x02" + _field(2, f"rpc status: {type(error).__name__}".encode()))
                connection.sendall(struct.pack(">IIBB", len(message), stream, 2, 0) + message)

    def answer(self, method: str, content: bytes) -> bytes:
        if method == "api.GetResourceService/GetResource":
            return self.resources[content.decode().removeprefix("kbs:///")]
        assert method == "api.SealedSecretService/UnsealSecret"
        payload = content.split(b".")[2]
        secret = json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))
        if secret["provider"] not in ("aliyun", "ehsm"):
            raise ValueError("unsupported provider")
        if secret["type"] == "vault":
            return self.resources[secret["name"]]
        key = self.kms.decrypt(base64.b64decode(secret["encrypted_key"]), OAEP)
        iv, data = (base64.b64decode(secret[name]) for name in ("iv", "encrypted_data"))
        return AESGCM(key).decrypt(iv, data, None)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.join(5)


OAEP = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)


def _number(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        value, at, last = value | (message[at] & 127) << shift, at + 1, message[at] < 128
        shift += 7
        if last:
            return value, at


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    at = 0
    while at < len(message):
        tag, at = _number(message, at)
        value, at = _number(message, at)
        if tag & 7 == 2:
            yield tag >> 3, message[at : at + value]
            at += value
        else:
            yield tag >> 3, value


def _field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + content


@pytest.fixture(scope="module")
def kms() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def hub_socket(
    tmp_path: Path, hub: Hub, kms: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubSocket]:
    path = tmp_path / "cdh.sock"
    server = HubSocket(path, hub.resources, kms)
    server.start()
    monkeypatch.setattr("encfs.cdh.SOCKET", path)
    try:
        yield server
    finally:
        server.close()


def envelope(kms: rsa.RSAPrivateKey, secret: bytes, **members: object) -> dict[str, object]:
    """As docs/SEALED_SECRET.md has them: a fresh key under the provider's, the secret under the fresh key."""
    key, iv = os.urandom(32), os.urandom(12)
    texts = {
        "encrypted_key": kms.public_key().encrypt(key, OAEP),
        "encrypted_data": AESGCM(key).encrypt(iv, secret, None),
        "iv": iv,
    }
    made = {"version": "0.1.0", "type": "envelope", "provider": "aliyun", "key_id": "key-1", "wrap_type": "A256GCM"}
    made |= {name: base64.b64encode(value).decode() for name, value in texts.items()}
    return made | {"provider_settings": {}, "annotations": {}} | members


def test_an_envelope_is_unsealed_by_the_hub(
    hub: Hub, hub_socket: HubSocket, kms: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    one = by_secret(hub, tmp_path, sealed(envelope(kms, KEK)))
    assert opened(one) == opened(one) == b"secret"
    assert hub.asked == ["/cdh/resource/default/signing/owner"]
    assert hub_socket.asked == ["UnsealSecret"]
    # What came out may carry refusals like any resource.
    bound = encoded({"key": KEK_TEXT, "id": "acme/chat", "min_version": 7})
    one = by_secret(hub, tmp_path, sealed(envelope(kms, bound)))
    assert opened(one) == b"secret"
    assert (one.binding.artifact_id, one.binding.min_version) == ("acme/chat", 7)


def test_everything_over_the_socket(hub: Hub, hub_socket: HubSocket, tmp_path: Path) -> None:
    text = sealed(SECRET | {"provider": "aliyun", "name": "chat"})
    by_secret(hub, tmp_path, text)
    hub.resources["chat"] = KEK
    socket_path = tmp_path / "cdh.sock"
    found = provider_from_uri(f"cdh:sealed={tmp_path / 'secret'}?socket={socket_path}")
    assert isinstance(found, CdhProvider)
    assert opened(found) == b"secret"
    plain = provider_from_uri(f"cdh:default/key/model?socket={socket_path}")
    assert isinstance(plain, CdhProvider)
    assert opened(plain) == b"secret"
    assert hub_socket.asked == ["GetResource", "UnsealSecret", "GetResource"]
    assert hub.asked == [], "nothing went over HTTP"


def test_an_envelope_that_is_not_signed_never_reaches_the_hub(
    hub: Hub, hub_socket: HubSocket, kms: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    genuine = sealed(envelope(kms, KEK))
    stranger = ec.generate_private_key(ec.SECP256R1())
    for text in (
        sealed(envelope(kms, KEK), signer=stranger),
        *(
            genuine[:at] + ("A" if genuine[at] != "A" else "B") + genuine[at + 1 :]
            for at in range(90, len(genuine), 41)
        ),
    ):
        with pytest.raises((KeyFileError, KeyProviderError)):
            opened(by_secret(hub, tmp_path, text))
    assert hub_socket.asked == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provider": "kbs"}, "failed with code 2: rpc status: ValueError"),
        ({"encrypted_data": base64.b64encode(bytes(48)).decode()}, "failed with code 2: rpc status: InvalidTag"),
        ({"encrypted_key": base64.b64encode(bytes(256)).decode()}, "failed with code 2: rpc status: ValueError"),
        ({"iv": 5}, "has no text iv"),
    ],
)
def test_envelopes_that_do_not_open(
    hub: Hub, hub_socket: HubSocket, kms: rsa.RSAPrivateKey, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises((KeyFileError, KeyProviderError), match=message):
        opened(by_secret(hub, tmp_path, sealed(envelope(kms, KEK) | change)))


def test_what_the_hub_unseals_is_no_key(
    hub: Hub, hub_socket: HubSocket, kms: rsa.RSAPrivateKey, tmp_path: Path
) -> None:
    with pytest.raises(KeyFileError, match="cdh:sealed="):
        opened(by_secret(hub, tmp_path, sealed(envelope(kms, b"password"))))


def test_an_envelope_without_the_hubs_socket(
    hub: Hub, kms: rsa.RSAPrivateKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("encfs.cdh.SOCKET", tmp_path / "none")
    with pytest.raises(KeyProviderError, match="gives no answer") as refused:
        opened(by_secret(hub, tmp_path, sealed(envelope(kms, KEK))))
    assert "socket=PATH" in str(refused.value.hint)


@pytest.mark.parametrize(
    "rest", ["a/b/c?socket=relative", "a/b/c?socket=", "a/b/c?port=1&port=2", f"a/b/c?socket=/{'x' * 101}"]
)
def test_malformed_options(rest: str) -> None:
    with pytest.raises(KeyFileError):
        CdhProvider(rest)
