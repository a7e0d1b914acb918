"""Our client and our broker against the types, and the way with responses, of Trustee's own crate `kbs-types`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from encfs.encoding import b64_encode, b64url_decode, b64url_encode
from encfs.errors import KeyProviderError
from encfs.kbs import jwe, protocol
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import provider_from_uri
from encfs.keys.secrets import SymmetricKey
from tests.support.broker import Answer, Handshake, Served, make_broker
from tests.support.broker import serving as serving_broker
from tests.support.kbs_judge import Judge, JudgedServer, build_judge, needs_cargo
from tests.support.kbs_server import encoded, error, make_certificate, serving

pytestmark = needs_cargo

DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))
#: Of the session keys that the guest components have.
CURVES = ("P-256", "P-521")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return build_judge()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving_broker(make_broker(tmp_path_factory.mktemp("broker") / "b", "--host", "127.0.0.1")) as served:
        yield served


def test_our_client_talks_to_their_types(judge: Judge, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path)
    with serving(JudgedServer(judge), certificate) as server:
        server.resources["default/key/model"] = KEK
        provider = provider_from_uri(f"kbs:{server.url}/default/key/model?ca={certificate[0]}&tee=sample&timeout=60")
        keyring = create_keyring(b"secret", DIGEST, [SymmetricKey(bytearray(KEK))])
        assert bytes(parse_keyring(keyring, DIGEST).open([provider])) == b"secret"
        other = provider_from_uri(f"kbs:{server.url}/default/key/other?ca={certificate[0]}&tee=sample&timeout=60")
        with pytest.raises(KeyProviderError, match="no such resource"):
            parse_keyring(keyring, DIGEST).open([other])


@dataclass
class TheirClient(Handshake):
    """A client that writes the judge's messages and opens responses as the guest components do."""

    judge: Judge = field(default=None)  # type: ignore[assignment]
    curve: str = "P-256"
    pair: dict[str, Any] = field(default_factory=dict)

    def auth(self) -> Answer:
        message = {"version": self.version, "tee": self.tee, "extra-params": {}}
        written = self.judge.run("request", encoded(message))
        answer = self.request("POST", "/kbs/v0/auth", written)
        assert answer.status == 200, answer.body
        self.cookie = answer.headers["Set-Cookie"].split(";")[0]
        self.nonce = self.judge.parsed("challenge", answer.body)["nonce"]
        return answer

    def message(self) -> dict[str, Any]:
        self.pair = self.judge.keygen(self.curve)
        runtime = {"nonce": self.nonce, "tee-pubkey": self.pair["tee-pubkey"]}
        message: dict[str, Any] = {
            "init-data": {"format": "toml", "body": "algorithm = 'sha384'"},
            "runtime-data": runtime,
            "tee-evidence": {"primary_evidence": None, "additional_evidence": ""},
        }
        bound = bytes.fromhex(self.judge.run("report-data", encoded(message)).decode())
        message["tee-evidence"]["primary_evidence"] = {"svn": "1", "report_data": b64_encode(bound)}
        return self.judge.parsed("attestation", encoded(message))


@pytest.mark.parametrize("curve", CURVES)
def test_their_client_talks_to_our_broker(judge: Judge, broker: Served, curve: str) -> None:
    client = TheirClient(broker.url, broker.ca, judge=judge, curve=curve)
    answer = client.attested().resource()
    assert answer.status == 200
    key = json.loads((broker.directory.parent / "kek.jwk").read_text())["k"]
    assert judge.open(answer.document, client.pair) == b64url_decode(key, "k")
    # Refusals are of their type, too.
    missing = client.resource("default/key/none")
    assert missing.status in (401, 404)
    told = judge.parsed("error", missing.body)
    assert set(told) == {"type", "detail"}
    assert told["type"].startswith(protocol.ERROR_PREFIX)


def test_responses_in_both_directions(judge: Judge) -> None:
    """The guest components write the protected header anew to check it: its order has to be the one they write."""
    key = jwe.session_key()
    for content in (b"", b"x", bytes(100_000)):
        theirs = json.loads(judge.seal(content, jwe.public_members(key.public)))
        assert bytes(jwe.decrypt(theirs, key)) == content
        for curve in CURVES:
            pair = judge.keygen(curve)
            ours = jwe.encrypt(content, jwe.parse_public(pair["tee-pubkey"]))
            assert judge.open(ours, pair) == content


@pytest.mark.parametrize("curve", CURVES)
def test_what_the_judge_refuses(judge: Judge, curve: str) -> None:
    pair = judge.keygen(curve)
    ours: dict[str, str] = jwe.encrypt(b"content", jwe.parse_public(pair["tee-pubkey"]))

    def refused(response: dict[str, str], own: dict[str, Any] = pair) -> bool:
        return judge.refuses("open", encoded(own | {"response": response}))

    assert not refused(ours)
    assert refused(ours, judge.keygen(curve))
    for member in ("encrypted_key", "iv", "ciphertext", "tag"):
        changed = bytearray(b64url_decode(ours[member], member))
        changed[0] ^= 1
        assert refused(ours | {member: b64url_encode(bytes(changed))}), member
    assert judge.refuses("request", encoded({"version": "0.4.0", "tee": "unknown", "extra-params": {}}))
    assert judge.refuses("attestation", encoded({"runtime-data": {}}))
    assert not judge.refuses("error", error(401, "PolicyDeny", "no")[2])
