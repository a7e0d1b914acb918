"""`kbs:` against a server that speaks Trustee's protocol over TLS: what opens, what is refused, what is tried again."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from encfs.errors import EncfsError, KeyFileError, KeyProviderError, KeyRefusedError
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import provider_from_uri
from encfs.keys.providers.kbs import KbsProvider
from encfs.keys.secrets import SymmetricKey
from tests.support.kbs_server import KbsServer, Reply, encoded, error, make_certificate, serving

PATH = "default/key/model"
DIGEST = "sha256:" + "5a" * 32
KEK = bytes(range(32))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def server(certificate: tuple[Path, Path]) -> Iterator[KbsServer]:
    server = KbsServer()
    server.resources[PATH] = KEK
    with serving(server, certificate):
        yield server


def provider(server: KbsServer, certificate: tuple[Path, Path], more: str = "", *, path: str = PATH) -> KbsProvider:
    found = provider_from_uri(f"kbs:{server.url}/{path}?ca={certificate[0]}&tee=sample&timeout=20{more}")
    assert isinstance(found, KbsProvider)
    return found


def opened(provider: KbsProvider, kek: bytes = KEK) -> bytes:
    """The payload of a keyring for `kek`, opened by the provider."""
    keyring = create_keyring(b"secret", DIGEST, [SymmetricKey(bytearray(kek), f"kbs:///{PATH}")])
    return bytes(parse_keyring(keyring, DIGEST).open([provider]))


def test_a_handshake_opens_a_keyring(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    one = provider(server, certificate)
    assert opened(one) == b"secret"
    assert server.asked == ["auth", "attest", "resource"]
    assert server.queries == [f"content-digest={DIGEST}"]
    # Releases are counted: the key is kept until the provider is closed.
    assert opened(one) == b"secret"
    assert server.asked == ["auth", "attest", "resource"]
    one.close()
    assert opened(one) == b"secret"
    assert server.asked == ["auth", "attest", "resource"] * 2
    keys = [session["key"] for session in server.sessions.values()]
    assert keys[0] != keys[1], "a session's key pair is never used again"


@pytest.mark.parametrize(
    "content",
    [
        KEK,
        base64.b64encode(KEK),
        json.dumps({"kty": "oct", "k": base64.urlsafe_b64encode(KEK).rstrip(b"=").decode()}).encode(),
        json.dumps({"key": base64.b64encode(KEK).decode()}).encode(),
    ],
    ids=["raw", "base64", "jwk", "json"],
)
def test_forms_of_a_key(server: KbsServer, certificate: tuple[Path, Path], content: bytes) -> None:
    server.resources[PATH] = content
    assert opened(provider(server, certificate)) == b"secret"


def test_an_older_version_is_tried(certificate: tuple[Path, Path]) -> None:
    server = KbsServer(version="0.2.0")
    server.resources[PATH] = KEK
    with serving(server, certificate):
        assert opened(provider(server, certificate)) == b"secret"
    assert server.asked == ["auth", "auth", "attest", "resource"]


def test_a_version_nobody_speaks(certificate: tuple[Path, Path]) -> None:
    with serving(KbsServer(version="0.9.0"), certificate) as server, pytest.raises(KeyProviderError, match="versions"):
        opened(provider(server, certificate))


def test_the_owner_fetches_the_key_to_encrypt_to(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    key = provider(server, certificate).fetch()
    assert bytes(key.secret) == KEK
    assert key.kid == f"kbs:///{PATH}"


def test_without_the_authority_nothing_is_said(server: KbsServer) -> None:
    with pytest.raises(KeyProviderError, match=r"certificate .* is refused"):
        opened(KbsProvider(f"{server.url}/{PATH}?tee=sample&timeout=1"))
    assert server.asked == []


def test_a_denied_key_is_final(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    server.denied.add(PATH)
    with pytest.raises(KeyRefusedError, match="the policy does not allow it"):
        opened(provider(server, certificate))
    assert server.asked.count("auth") == 1


def test_refused_evidence_is_final(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    server.faults["attest"] = lambda _: error(401, "AttestationFailed", "another measurement")
    with pytest.raises(KeyRefusedError, match="another measurement"):
        opened(provider(server, certificate))
    assert server.asked == ["auth", "attest"]


def test_a_missing_key(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    with pytest.raises(KeyProviderError, match="has no kbs:///default/key/other"):
        opened(provider(server, certificate, path="default/key/other"))


@pytest.mark.parametrize("step", ["auth", "attest", "resource"])
def test_a_server_that_dies_in_the_middle(server: KbsServer, certificate: tuple[Path, Path], step: str) -> None:
    """The connection ends without an answer and the session is lost: the next handshake succeeds."""

    def die(_: Reply) -> Reply | None:
        del server.faults[step]
        server.sessions.clear()
        return None

    server.faults[step] = die
    assert opened(provider(server, certificate)) == b"secret"
    assert server.asked.count("auth") == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: KbsServer, certificate: tuple[Path, Path], status: int) -> None:
    left = [3]

    def busy(reply: Reply) -> Reply:
        left[0] -= 1
        return error(status, "Busy", "later") if left[0] else reply

    server.faults["attest"] = busy
    assert opened(provider(server, certificate)) == b"secret"


def test_a_second_broker_stands_in(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    gone = KbsServer()
    with serving(gone, certificate):
        pass
    address = f"kbs:{gone.url}/{PATH}?url={server.url}&ca={certificate[0]}&tee=sample"
    found = provider_from_uri(address)
    assert isinstance(found, KbsProvider)
    assert opened(found) == b"secret"


def test_an_unclear_401_ends(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    server.faults["attest"] = lambda _: error(401, "RcarAttestFailed", "who knows")
    with pytest.raises(KeyProviderError, match="who knows"):
        opened(provider(server, certificate))
    assert server.asked.count("attest") == 3


def test_time_is_bounded(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    server.faults["auth"] = lambda _: error(503, "Busy", "always")
    with pytest.raises(KeyProviderError, match="always"):
        opened(KbsProvider(f"{server.url}/{PATH}?ca={certificate[0]}&tee=sample&timeout=1"))


def _replaced(reply: Reply, **members: Any) -> Reply:
    return reply[0], reply[1], encoded(json.loads(reply[2]) | members)


def _flipped(text: str) -> str:
    data = bytearray(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    data[0] ^= 1
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        ("auth", lambda reply: (200, reply[1], b"")),
        ("auth", lambda reply: (200, reply[1], reply[2][:-4])),
        ("auth", lambda reply: (200, reply[1], b"[]")),
        ("auth", lambda reply: _replaced(reply, nonce=7)),
        ("auth", lambda reply: _replaced(reply, nonce="")),
        ("auth", lambda reply: _replaced(reply, nonce="A" * 513)),
        ("auth", lambda reply: (200, {}, reply[2])),
        ("auth", lambda reply: (200, {"Set-Cookie": "kbs-session-id=a b;c"}, reply[2])),
        ("auth", lambda reply: (200, {"Set-Cookie": "kbs-session-id=" + "a" * 600}, reply[2])),
        ("attest", lambda _: (200, {}, b"token")),
        ("attest", lambda _: (200, {}, b"[" * 70000)),
        ("attest", lambda _: (302, {"Location": "http://127.0.0.1:1/"}, b"")),
        ("resource", lambda reply: (200, {}, b"{}")),
        ("resource", lambda reply: _replaced(reply, ciphertext=7)),
        ("resource", lambda reply: _replaced(reply, iv="AAAA")),
        ("resource", lambda reply: _replaced(reply, tag=_flipped(json.loads(reply[2])["tag"]))),
        ("resource", lambda reply: _replaced(reply, encrypted_key=_flipped(json.loads(reply[2])["encrypted_key"]))),
        ("resource", lambda reply: _replaced(reply, ciphertext=_flipped(json.loads(reply[2])["ciphertext"]))),
        ("resource", lambda reply: _replaced(reply, protected="e30")),
    ],
)
def test_malformed_answers(server: KbsServer, certificate: tuple[Path, Path], step: str, fault: Any) -> None:
    server.faults[step] = fault
    with pytest.raises(KeyProviderError, match=r"breaks the key broker protocol|refused") as caught:
        opened(provider(server, certificate))
    assert caught.value.__cause__ is None


def test_an_answer_without_end(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    server.faults["attest"] = lambda _: (200, {}, b" " * (2 << 20))
    with pytest.raises(KeyProviderError, match="more than 1048576 bytes"):
        opened(KbsProvider(f"{server.url}/{PATH}?ca={certificate[0]}&tee=sample&timeout=1"))


def test_the_answer_to_another_session(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    """A resource that was encrypted to an earlier session's key, replayed."""
    kept: list[Reply] = []

    def keep(reply: Reply) -> Reply:
        kept.append(reply)
        return kept[0]

    server.faults["resource"] = keep
    assert opened(provider(server, certificate)) == b"secret"
    with pytest.raises(KeyProviderError, match="not for this session"):
        opened(provider(server, certificate))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"key": 7}, "neither base64"),
        ({"key": base64.b64encode(KEK).decode(), "floor": 7}, "does not know"),
        ({"key": base64.b64encode(KEK).decode(), "pins": []}, "pins"),
        ({"key": base64.b64encode(KEK).decode(), "pins": ["sha256:1"]}, "pin"),
        ({"key": base64.b64encode(KEK).decode(), "min_version": -1}, "min_version"),
        ({"key": base64.b64encode(KEK).decode(), "min_version": True}, "min_version"),
        ({"key": base64.b64encode(KEK).decode(), "id": ""}, "id is not"),
    ],
)
def test_malformed_resources(
    server: KbsServer, certificate: tuple[Path, Path], document: dict[str, Any], message: str
) -> None:
    server.resources[PATH] = json.dumps(document).encode()
    with pytest.raises(KeyFileError, match=message) as caught:
        opened(provider(server, certificate))
    assert base64.b64encode(KEK).decode() not in str(caught.value)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("", "no host"),
        ("https://h/a/b", "no host"),
        ("https://h", "no host"),
        ("ftp://h/a/b/c", "not an http"),
        ("https://u@h/a/b/c", "more than a host"),
        ("https://h:99999/a/b/c", "not a URL"),
        ("https://h/a/b/..", "not a resource's path"),
        ("https://h/a/b/c?nonsense=1", "not known"),
        ("https://h/a/b/c?ca=x&ca=y", "twice"),
        ("https://h/a/b/c?timeout=0", "seconds"),
        ("https://h/a/b/c?tee=abacus", "not known"),
        ("https://h/a/b/c?x", "malformed"),
        ("///a/b/c", "names no broker"),
        ("https://h/a/b/c\n", "characters"),
    ],
)
def test_malformed_uris(rest: str, message: str) -> None:
    with pytest.raises(KeyFileError, match=message):
        KbsProvider(rest)


def test_a_machine_without_a_tee(server: KbsServer, certificate: tuple[Path, Path]) -> None:
    if os.path.exists("/dev/sev-guest"):
        assert KbsProvider(f"{server.url}/{PATH}")
        return
    with pytest.raises(EncfsError, match="no TEE"):
        opened(KbsProvider(f"{server.url}/{PATH}?ca={certificate[0]}"))
    assert server.asked == []


@pytest.mark.parametrize(
    ("refusal", "code"),
    [({}, 0), ({"min_version": 4}, 33), ({"id": "acme/other"}, 32), ({"pins": ["sha256:" + "0" * 64]}, 34)],
)
def test_what_came_with_the_key_decides(
    server: KbsServer, certificate: tuple[Path, Path], tmp_path: Path, refusal: dict[str, Any], code: int
) -> None:
    """The programs as a user runs them: the owner encrypts to the broker's key, a consumer reads with it."""
    uri = f"kbs:{server.url}/{PATH}?ca={certificate[0]}&tee=sample&timeout=20"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "file").write_bytes(b"plaintext")

    def run(*words: str) -> subprocess.CompletedProcess[bytes]:
        program = Path(sys.executable).parent / words[0]
        return subprocess.run([program, *words[1:]], cwd=tmp_path, capture_output=True, check=False)

    words = ("-r", f"{uri}&fetch=yes", "--id", "acme/chat", "--artifact-version", "3")
    made = run("imagetool", "encrypt", "src", "oci:store:v3", *words)
    assert made.returncode == 0, made.stderr
    server.resources[PATH] = encoded({"key": base64.b64encode(KEK).decode(), **refusal})
    read = run("encfs", "cat", "oci:store:v3", "file", "-k", uri, "--allow-unsigned")
    assert read.returncode == code, read.stderr
    assert read.stdout == (b"plaintext" if code == 0 else b"")
    assert b"came with the key" in read.stderr or b"was released for" in read.stderr or code == 0
