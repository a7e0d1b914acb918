"""A running broker, its protocol, and everything that a client can do wrong. TLS, real processes, SQLite."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from encfs.encoding import b64_encode
from encfs.kbs import jwe
from encfs.kbs.resource import parse_resource
from encfs.keys.secrets import SymmetricKey
from tests.support.broker import (
    PATH,
    SAMPLE_POLICY,
    Handshake,
    Served,
    configure,
    imagetool,
    make_broker,
    sample,
    serving,
    set_policy,
)
from tests.support.waiting import LONG, wait_until


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = make_broker(tmp_path_factory.mktemp("broker") / "b", "--host", "127.0.0.1")
    configure(directory, rate=5000, burst=10000)
    with serving(directory) as served:
        yield served


@pytest.fixture
def client(broker: Served) -> Handshake:
    return Handshake(broker.url, broker.ca)


def kek(broker: Served) -> bytes:
    document = json.loads((broker.directory.parent / "kek.jwk").read_text())
    return bytes(parse_resource(json.dumps(document).encode(), "it").key.secret)  # type: ignore[union-attr]


def last_entry(broker: Served) -> dict[str, Any]:
    found: dict[str, Any] = imagetool("broker", "releases", broker.directory)["entries"][-1]
    return found


@pytest.mark.parametrize("version", ["0.4.0", "0.2.0"])
def test_a_handshake(broker: Served, client: Handshake, version: str) -> None:
    client.version = version
    answer = client.attested().resource()
    assert client.opened(answer) == kek(broker)
    assert answer.headers["Cache-Control"] == "no-store"
    entry = last_entry(broker)
    assert (entry["event"], entry["path"], entry["rule"]) == ("released", PATH, "default/key/*")
    assert client.cookie.split("=")[1] not in json.dumps(entry)


def test_a_session_with_an_rsa_key(broker: Served, client: Handshake) -> None:
    client.key = jwe.session_key(use_rsa=True)
    assert client.opened(client.attested().resource()) == kek(broker)


def test_a_bearer_token_stands_in_for_the_cookie(broker: Served, client: Handshake) -> None:
    token = client.begin().attest().document["token"]
    claims = json.loads(__import__("base64").urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["exp"] > 0
    client.cookie = ""
    assert client.opened(client.resource(headers={"Authorization": f"Bearer {token}"})) == kek(broker)
    for wrong in (token[:-2], token[:-4] + "AAAA", "x", "a.b.c", "é", "." * 3000):
        answer = client.resource(headers={"Authorization": f"Bearer {wrong}".encode().decode("latin-1")})
        assert (answer.status, answer.kind) == (401, "SessionNotFound")


def test_the_cookie_is_for_this_server_alone(client: Handshake) -> None:
    cookie = client.auth().headers["Set-Cookie"]
    assert {"HttpOnly", "Secure", "Path=/"} <= set(cookie.split("; "))


# Out of order, replayed, of another session


def test_a_resource_before_evidence(client: Handshake) -> None:
    answer = client.begin().resource()
    assert (answer.status, answer.kind) == (401, "SessionNotFound")
    assert "send it first" in answer.document["detail"]
    # Nothing was spent.
    assert client.attest().status == 200


def test_without_a_session(client: Handshake) -> None:
    assert client.resource().status == 401
    assert client.attest({}).status == 401
    client.cookie = "kbs-session-id=" + "0" * 32
    assert client.resource().kind == "SessionNotFound"
    assert client.attest({}).kind == "SessionNotFound"
    client.cookie = "kbs-session-id=" + "0" * 5000
    assert client.resource().status == 401


def test_cookies_that_no_broker_wrote(broker: Served, client: Handshake) -> None:
    client.begin()
    name, _, value = client.cookie.partition("=")
    message = client.message()
    altered = [value[:at] + ("A" if value[at] != "A" else "B") + value[at + 1 :] for at in range(0, len(value), 5)]
    for wrong in (*altered, "", "A" * 43, "A" * 512, value[:-1], value[1:], value + "A", value[:-43], "x y", "é"):
        client.cookie = f"{name}={wrong}"
        answer = client.attest(message)
        assert (answer.status, answer.kind) == (401, "SessionNotFound"), wrong
        assert client.resource().kind == "SessionNotFound", wrong
    client.cookie = f"{name}={value}"
    assert client.attest(message).status == 200


def test_a_nonce_is_used_once(client: Handshake) -> None:
    client.begin()
    message = client.message()
    assert client.attest(message).status == 200
    again = client.attest(message)
    assert (again.status, again.kind) == (401, "SessionNotFound")


def test_of_two_at_once_one_attests(client: Handshake) -> None:
    for _ in range(5):
        client.begin()
        message = client.message()
        with ThreadPoolExecutor(8) as pool:
            statuses = list(pool.map(lambda _, message=message: client.attest(message).status, range(8)))
        assert sorted(statuses) == [200] + [401] * 7


def test_evidence_of_another_session(broker: Served, client: Handshake) -> None:
    # Of one address only so many refusals have an entry of the log.
    client.source = "127.0.2.1"
    other = Handshake(broker.url, broker.ca).begin()
    client.begin()
    answer = client.attest(other.message())
    assert (answer.status, answer.kind) == (401, "AttestationFailed")
    # With this session's nonce and the other's evidence.
    message = client.message()
    message["tee-evidence"] = other.message()["tee-evidence"]
    answer = client.attest(message)
    assert (answer.status, answer.kind) == (401, "AttestationFailed")
    entry = last_entry(broker)
    assert (entry["event"], entry["reasons"][0]["code"]) == ("refused-evidence", "report-data")
    # The nonce is spent.
    assert client.attest().kind == "SessionNotFound"


def test_a_key_that_the_evidence_is_not_bound_to(client: Handshake) -> None:
    client.begin()
    message = client.message()
    message["runtime-data"]["tee-pubkey"] = jwe.public_members(jwe.session_key().public)
    assert client.attest(message).kind == "AttestationFailed"


def test_another_tee_than_announced(client: Handshake) -> None:
    client.tee = "snp"
    client.begin()
    answer = client.attest()
    assert (answer.status, answer.kind) == (400, "InvalidRequest")


# Malformed

_AUTH: list[Any] = [
    *(b"", b"{", b"[]", b"null", b"7", b'{"version"', b"\xff\xfe", b'{"version":"0.4.0","version":"0.4.0"}'),
    *({}, {"version": 4, "tee": "sample"}, {"version": "0.4.0"}, {"version": "0.4.0", "tee": 7}),
    *({"version": "0.4.0", "tee": "abacus"}, {"version": "0.4.0", "tee": ""}, b"[" * 10_000),
]


@pytest.mark.parametrize("body", _AUTH, ids=range(len(_AUTH)))
def test_malformed_requests(client: Handshake, body: Any) -> None:
    answer = client.request("POST", "/kbs/v0/auth", body)
    assert answer.status in (400, 401)
    assert answer.kind in ("InvalidRequest", "ProtocolVersion")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("version", ["0.1.0", "0.1.1", "0.3.0", "0.4.1", "0.4.0 ", "v0.4.0", "1.0.0"])
def test_versions_are_exact(client: Handshake, version: str) -> None:
    client.version = version
    answer = client.auth()
    assert (answer.status, answer.kind) == (401, "ProtocolVersion")


def _set(*path: str) -> Callable[[dict[str, Any], Any], None]:
    def change(message: dict[str, Any], value: Any) -> None:
        for name in path[:-1]:
            message = message[name]
        if value is None and path[-1] in message:
            del message[path[-1]]
        else:
            message[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "values"),
    [
        (("runtime-data",), [None, 7, [], "x"]),
        (("tee-evidence",), [None, 7, [], "x"]),
        (("init-data",), [7, "x", []]),
        (("runtime-data", "nonce"), [None, 7, "", "x" * 513]),
        (("runtime-data", "tee-pubkey"), [None, 7, {}, {"kty": "EC"}, {"kty": "oct", "alg": "dir", "k": "AAAA"}]),
        (("runtime-data", "tee-pubkey", "alg"), ["RSA1_5", "none", 7]),
        (("runtime-data", "tee-pubkey", "crv"), ["P-257", "Ed25519"]),
        (("runtime-data", "tee-pubkey", "x"), ["AAAA", b64_encode(b"x" * 32), "A" * 43]),
        (("tee-evidence", "primary_evidence"), [None, 7, [], "x", {}, {"quote": "AAAA"}]),
        (
            ("tee-evidence", "primary_evidence", "report_data"),
            [7, "?", "", b64_encode(bytes(48)), b64_encode(bytes(99))],
        ),
        (("tee-evidence", "additional_evidence"), ["x", 7, {}]),
    ],
)
def test_malformed_attestations(client: Handshake, path: tuple[str, ...], values: list[Any]) -> None:
    for value in values:
        client.cookie = ""
        client.begin()
        message = client.message()
        _set(*path)(message, value)
        answer = client.attest(message)
        assert answer.status in (400, 401), (value, answer.body)
        assert answer.kind in ("InvalidRequest", "AttestationFailed"), value
        assert client.resource().status == 401


def test_every_prefix_of_a_message_is_refused(client: Handshake) -> None:
    client.begin()
    content = json.dumps(client.message()).encode()
    for end in range(0, len(content), 23):
        assert client.attest(content[:end]).status == 400
    # A message that could not be read spends nothing.
    assert client.attest(content).status == 200


def test_a_large_message(client: Handshake) -> None:
    for body in (b" " * ((1 << 20) + 1), b'{"x":"' + b"y" * (2 << 20) + b'"}'):
        try:
            answer = client.request("POST", "/kbs/v0/auth", body)
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            continue  # it said no before everything was sent
        assert answer.status == 413
    assert client.attested()


@pytest.mark.parametrize(
    "path",
    [
        "a",
        "a/b",
        "a/b/c/d",
        "a/b/",
        "../a/b",
        "a/../b",
        "a/b/c%00",
        "a/b/c%0a",
        "%2e%2e/b/c",
        "a//b",
        "x" * 300 + "/b/c",
        "",
    ],
)
def test_malformed_paths(client: Handshake, path: str) -> None:
    assert client.attested().resource(path).status in (400, 404)


@pytest.mark.parametrize(
    "query", ["?content-digest=", "?content-digest=sha256:1", f"?content-digest=sha256:{'0' * 64}&content-digest=x"]
)
def test_malformed_digests(client: Handshake, query: str) -> None:
    assert client.attested().resource(query=query).status == 400


def test_other_names_and_methods(client: Handshake) -> None:
    assert client.request("GET", "/").status == 404
    assert client.request("GET", "/kbs/v0/auth").status == 405
    assert client.request("POST", "/kbs/v0/resource/a/b/c", b"x").status == 405
    assert client.request("POST", "/kbs/v0/resource-policy", b"{}").status == 404
    assert client.request("GET", "/kbs/v0/nothing").kind == "InvalidRequest"


def test_what_is_no_http(broker: Served) -> None:
    address = urlsplit(broker.url)
    context = ssl.create_default_context(cafile=str(broker.ca))
    for content in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000):
        with (
            socket.create_connection(("127.0.0.1", address.port), timeout=LONG) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.sendall(content)
            assert b" 400 " in wrapped.recv(4096)


def test_plain_text_on_the_tls_port(broker: Served) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(broker.url).port), timeout=LONG) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b"ok" not in raw.recv(4096)


# What policy and owner say


def test_what_no_rule_is_for(broker: Served, client: Handshake) -> None:
    answer = client.attested().resource("other/key/chat")
    assert (answer.status, answer.kind) == (401, "PolicyDeny")
    assert last_entry(broker)["reasons"][0]["code"] == "no-rule"


def test_a_missing_key_is_said_only_to_whom_it_would_be_given(broker: Served, client: Handshake) -> None:
    assert client.attested().resource("default/key/none").status == 404
    assert last_entry(broker)["reasons"][0]["code"] == "no-key"


def test_policy_changes_take_effect_at_once(broker: Served, client: Handshake) -> None:
    digest = "sha256:" + "5a" * 32
    client.attested()
    try:
        set_policy(broker.directory, SAMPLE_POLICY + f'content_digests = ["{digest}"]\nartifact_id = "acme/chat"\n')
        assert client.resource().kind == "PolicyDeny"
        assert client.resource(query="?content-digest=sha256:" + "00" * 32).kind == "PolicyDeny"
        assert last_entry(broker)["reasons"][0]["code"] == "content-digest"
        released = parse_resource(client.opened(client.resource(query=f"?content-digest={digest}")), "it")
        assert isinstance(released.key, SymmetricKey)
        assert bytes(released.key.secret) == kek(broker)
        assert released.binding.pins == (digest,)
        assert released.binding.artifact_id == "acme/chat"
        set_policy(broker.directory, SAMPLE_POLICY + "expires = 2020-01-01T00:00:00Z\n")
        assert client.resource().kind == "PolicyDeny"
        assert last_entry(broker)["reasons"][0]["code"] == "expired"
        set_policy(broker.directory, "")
        assert client.resource().kind == "PolicyDeny"
        # Nobody's sample evidence is looked at any more.
        assert Handshake(broker.url, broker.ca).begin().attest().kind == "AttestationFailed"
    finally:
        set_policy(broker.directory, SAMPLE_POLICY)
    assert client.opened(client.resource()) == kek(broker)


def test_releases_are_counted_over_all_workers(broker: Served, client: Handshake) -> None:
    before = imagetool("broker", "key", "list", broker.directory)["keys"][0]["releases"]
    client.attested()
    try:
        set_policy(broker.directory, SAMPLE_POLICY + f"releases = {before + 5}\n")
        # Nobody is given anything by it.
        assert client.request("HEAD", f"/kbs/v0/resource/{PATH}").status == 405
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda _: client.resource(), range(12)))
        assert sorted(answer.status for answer in answers) == [200] * 5 + [401] * 7
        assert last_entry(broker)["reasons"][0]["code"] == "releases"
    finally:
        set_policy(broker.directory, SAMPLE_POLICY)


def test_opaque_resources(broker: Served, client: Handshake, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"any bytes\0")
    secret.chmod(0o600)
    imagetool("broker", "key", "add", broker.directory, "default/key/opaque", "--opaque", secret)
    client.attested()
    assert client.opened(client.resource("default/key/opaque")) == b"any bytes\0"
    try:
        set_policy(broker.directory, SAMPLE_POLICY + "min_version = 1\n")
        assert client.resource("default/key/opaque").kind == "PolicyDeny"
        assert last_entry(broker)["reasons"][0]["code"] == "opaque"
    finally:
        set_policy(broker.directory, SAMPLE_POLICY)
        imagetool("broker", "key", "remove", broker.directory, "default/key/opaque")


# Around it


def test_health_and_figures(broker: Served, client: Handshake) -> None:
    assert client.request("GET", "/healthz").body == b"ok\n"
    assert client.request("GET", "/readyz").body == b"ready\n"
    began = time.monotonic()
    assert client.request("HEAD", "/healthz").body == b""
    # Not when the connection is given up.
    assert time.monotonic() - began < 10
    client.attested().resource()

    def counted() -> bool:
        text = client.request("GET", "/metrics").body.decode()
        return 'encfs_broker_requests_total{reason="ok",status="200",step="resource"}' in text

    wait_until(counted)
    text = client.request("GET", "/metrics").body.decode()
    assert "encfs_broker_request_seconds_bucket" in text


def test_many_at_once(broker: Served) -> None:
    """Both workers, one chain."""
    before = imagetool("broker", "releases", broker.directory, "--verify")

    def one(_: int) -> bool:
        client = Handshake(broker.url, broker.ca)
        return client.opened(client.attested().resource()) == kek(broker)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(40)))
    after = imagetool("broker", "releases", broker.directory, "--verify", "--since", before["head"])
    assert after["entries"] == before["entries"] + 40


def test_nothing_secret_in_what_is_written(broker: Served, client: Handshake) -> None:
    client.attested().resource()
    session = client.cookie.split("=")[1]
    texts = [broker.errors.read_text(), json.dumps(imagetool("broker", "releases", broker.directory))]
    for text in texts:
        assert session not in text
        assert kek(broker).hex() not in text
        assert b64_encode(kek(broker)) not in text
    for file in broker.directory.iterdir():
        if file.name.startswith("broker.db"):
            assert kek(broker) not in file.read_bytes()
            assert file.stat().st_mode & 0o077 == 0, file


def test_a_slow_client_does_not_stop_others(broker: Served, client: Handshake) -> None:
    address = urlsplit(broker.url)
    raws = [socket.create_connection(("127.0.0.1", address.port), timeout=LONG) for _ in range(50)]
    try:
        for raw in raws:
            raw.sendall(b"\x16\x03\x01")
        done = threading.Event()

        def shake() -> None:
            client.attested()
            done.set()

        threading.Thread(target=shake, daemon=True).start()
        assert done.wait(LONG)
    finally:
        for raw in raws:
            raw.close()


def test_sample_is_what_it_says() -> None:
    assert sample(b"x") == {"svn": "1", "report_data": "eA=="}
