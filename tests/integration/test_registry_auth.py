"""Credentials and TLS against a real registry: where they come from, tokens that run out, and who never gets them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.encoding import b64_encode
from encfs.errors import AuthenticationError, NotFoundError, TransportError, UsageError
from encfs.oci.authentication import _Header, parse_challenges
from encfs.oci.credentials import Credential, find_credential
from tests.support.registry import (
    PASSWORD,
    USERNAME,
    Authority,
    DockerRegistry,
    Fault,
    FaultProxy,
    OciServer,
    TokenService,
)
from tests.support.remote import (
    SEGMENT,
    connected,
    describe,
    needs_docker_registry,
    needs_registries,
    put_image,
    running,
)
from tests.support.waiting import LONG

AUTH = b64_encode(f"{USERNAME}:{PASSWORD}".encode())


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials but the test's own."""
    for name in ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


def write_json(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def refused(host: str, error: type[Exception], match: str, **options: object) -> None:
    with connected(host, **{"io_timeout": 5.0, **options}) as registry, pytest.raises(error, match=match):
        registry.manifest()


def write_helper(directory: Path, name: str, script: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"docker-credential-{name}"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


# -- where credentials come from


@pytest.mark.parametrize(
    "place", ["registry_auth_file", "docker_config", "runtime", "xdg_config", "home_config", "docker_home"]
)
def test_files(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "registry_auth_file": tmp_path / "named.json",
        "docker_config": tmp_path / "docker/config.json",
        "runtime": tmp_path / "run/containers/auth.json",
        "xdg_config": tmp_path / "xdg/containers/auth.json",
        "home_config": tmp_path / "home/.config/containers/auth.json",
        "docker_home": tmp_path / "home/.docker/config.json",
    }
    if place == "registry_auth_file":
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(files[place]))
    if place == "docker_config":
        monkeypatch.setenv("DOCKER_CONFIG", str(files[place].parent))
    if place == "xdg_config":
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    assert find_credential("reg.example") is None
    write_json(files[place], {"auths": {"reg.example": {"auth": AUTH}}})
    found = find_credential("reg.example")
    assert found is not None
    assert (found.username, found.password) == (USERNAME, PASSWORD)
    assert str(files[place]) in found.source
    assert PASSWORD not in repr(found)
    assert find_credential("other.example") is None


def test_environment_comes_before_home_and_the_longest_key_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def entry(name: str) -> dict[str, str]:
        return {"auth": b64_encode(f"{name}:x".encode())}

    write_json(tmp_path / "home/.docker/config.json", {"auths": {"r.io": entry("home"), "only.io": entry("only")}})
    keys = {"r.io": entry("all"), "r.io/team": entry("team"), "r.io/team/app": entry("app")}
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(write_json(tmp_path / "auth.json", {"auths": keys})))
    for repository, name in (("", "all"), ("other/app", "all"), ("team/other", "team"), ("team/app", "app")):
        found = find_credential("r.io", repository)
        assert found is not None
        assert found.username == name
    only = find_credential("only.io")
    assert only is not None
    assert only.username == "only"


@pytest.mark.parametrize(
    "key", ["https://r.io", "https://r.io/", "https://r.io/v1/", "https://r.io/v2/", "http://r.io"]
)
def test_keys_of_old_versions_of_docker(key: str, tmp_path: Path) -> None:
    write_json(tmp_path / "home/.docker/config.json", {"auths": {key: {"auth": AUTH}}})
    assert find_credential("r.io") is not None


def test_docker_hub(tmp_path: Path) -> None:
    auths = {"https://index.docker.io/v1/": {"auth": AUTH}}
    write_json(tmp_path / "home/.docker/config.json", {"auths": auths})
    for name in ("docker.io", "registry-1.docker.io"):
        assert find_credential(name, "library/busybox") is not None


def test_identity_token_and_plain_fields(tmp_path: Path) -> None:
    auths = {
        "token.io": {"identitytoken": "secret token", "auth": b64_encode(b"<token>:")},
        "plain.io": {"username": "u", "password": "p"},
        "empty.io": {},
    }
    write_json(tmp_path / "home/.docker/config.json", {"auths": auths})
    token, plain = find_credential("token.io"), find_credential("plain.io")
    assert token is not None
    assert token.identity_token == "secret token"
    assert "secret" not in repr(token)
    assert plain is not None
    assert (plain.username, plain.password) == ("u", "p")
    assert find_credential("empty.io") is None


def test_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_directory = tmp_path / "bin"
    monkeypatch.setenv("PATH", f"{bin_directory}:{os.environ['PATH']}")
    write_helper(bin_directory, "one", 'read host; echo "{\\"Username\\":\\"$1\\",\\"Secret\\":\\"$host\\"}"')
    write_helper(bin_directory, "token", 'cat >/dev/null; echo \'{"Username":"<token>","Secret":"t"}\'')
    write_helper(bin_directory, "none", "echo 'credentials not found in native keychain'; exit 1")
    helpers = {"one.io": "one", "token.io": "token", "none.io": "none"}
    write_json(tmp_path / "home/.docker/config.json", {"credHelpers": helpers, "credsStore": "one"})
    one, token, store = find_credential("one.io"), find_credential("token.io"), find_credential("store.io:5000")
    assert one == Credential("get", "one.io", source="docker-credential-one")
    assert token is not None
    assert token.identity_token == "t"
    assert store is not None
    assert store.password == "store.io:5000"
    assert find_credential("none.io") is None
    hub = find_credential("docker.io")
    assert hub is not None
    assert hub.password == "https://index.docker.io/v1/"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", "status 3"),
        ("echo nonsense", "gave an answer that is none"),
        ("echo '[]'", "gave an answer that is none"),
        ("head -c 60000 /dev/zero | tr '\\0' '['", "gave an answer that is none"),
        ("yes", "more than"),
        ("exec sleep 60", "within"),
        ("exec >&-; exec sleep 60", "does not end"),
    ],
)
def test_broken_helpers(script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What ends is not to be ended.
    monkeypatch.setattr("encfs.oci.credentials._HELPER_SECONDS", 0.3 if "sleep" in script else LONG)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    write_helper(tmp_path / "bin", "broken", script)
    write_json(tmp_path / "home/.docker/config.json", {"credsStore": "broken"})
    with pytest.raises(AuthenticationError, match=message):
        find_credential("r.io")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        (" " * (1 << 20) + "{}", "not an object of at most"),
        ("[" * 100_000, "not JSON"),
        ('{"auths": {"r.io": {"auth": "secret!!"}}}', "not base64"),
        ('{"auths": {"r.io": {"auth": "c2VjcmV0"}}}', "not base64"),
        ('{"credsStore": "../../bin/sh"}', "odd credential helper"),
        ('{"credsStore": "no-such-helper"}', "cannot be run"),
    ],
)
def test_broken_files_are_named_and_their_secrets_are_not(document: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "home/.docker/config.json"
    file.parent.mkdir(parents=True)
    file.write_text(document)
    with pytest.raises(AuthenticationError, match=message) as caught:
        find_credential("r.io")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None or "secret" not in str(caught.value.__context__)


def test_a_token_is_in_no_repr() -> None:
    assert "secret" not in repr(_Header("Bearer secret", 1.0))


# -- challenges


@pytest.mark.parametrize(
    ("text", "challenges"),
    [
        ("", {}),
        ('Basic realm="x"', {"basic": {"realm": "x"}}),
        (
            'Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"',
            {"bearer": {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"}},
        ),
        (
            'Negotiate, Basic realm="a, b", Bearer realm=c',
            {"negotiate": {}, "basic": {"realm": "a, b"}, "bearer": {"realm": "c"}},
        ),
        ('BEARER Realm="a\\"b"', {"bearer": {"realm": 'a"b'}}),
        ('realm="x"', {}),
        ('Bearer realm="unclosed', {"bearer": {}}),
    ],
)
def test_challenges(text: str, challenges: dict[str, dict[str, str]]) -> None:
    parsed = parse_challenges(text)
    assert {name: fields for name, fields in parsed.items() if name in challenges} == challenges


def test_a_long_challenge_takes_no_time() -> None:
    parse_challenges("a" * 100_000)
    parse_challenges('Bearer realm="' + "\\" * 100_000)


# -- basic authentication


@pytest.fixture(scope="module")
def basic_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("basic"), basic=True) as server:
        yield server


@pytest.fixture
def basic(basic_server: DockerRegistry) -> Iterator[FaultProxy]:
    proxy = FaultProxy(basic_server.host)
    yield proxy
    proxy.close()


@needs_docker_registry
def test_basic(basic: FaultProxy, tmp_path: Path) -> None:
    file = tmp_path / "home/.docker/config.json"
    with connected(basic.host) as registry:
        with pytest.raises(AuthenticationError, match="wants credentials"):
            registry.manifest()
        assert len(basic.seen) == 1, "refused credentials are not tried again"
        write_json(file, {"auths": {basic.host: {"auth": b64_encode(b"owner:wrong")}}})
        with pytest.raises(AuthenticationError, match="refuses the user name and password") as caught:
            registry.manifest()
        assert len(basic.seen) == 3
        assert "wrong" not in str(caught.value)
        # A login while we run takes effect.
        write_json(file, {"auths": {basic.host: {"auth": AUTH}}})
        blob = registry.write_blob(b"content", SEGMENT)
        put_image(registry, [blob])
        assert registry.manifest().digest


@needs_docker_registry
def test_another_host_gets_no_credentials(basic: FaultProxy, tmp_path: Path) -> None:
    """Neither by a redirect, nor by an upload's address, nor by a token service, nor where it asks for them."""
    write_json(tmp_path / "home/.docker/config.json", {"auths": {basic.host: {"auth": AUTH}}})
    (tmp_path / "home/.netrc").write_text(f"machine 127.0.0.1 login {USERNAME} password {PASSWORD}\n")
    stranger = FaultProxy("127.0.0.1:1")
    try:
        with connected(basic.host, io_timeout=3.0) as registry:
            blob = registry.write_blob(b"content", SEGMENT)
            stranger.faults = [Fault("GET /stolen", reply=(200, {}), body=b"content")]
            basic.faults = [
                Fault("GET .*blobs", reply=(307, {"Location": f"http://{stranger.host}/stolen", "Set-Cookie": "a=b"}))
            ]
            assert registry.read_blob(blob, limit=10) == b"content"
            ask = {"WWW-Authenticate": 'Basic realm="x"'}
            stranger.faults = [Fault("GET /stolen", times=-1, reply=(401, ask))]
            basic.faults = [Fault("GET .*blobs", times=-1, reply=(302, {"Location": f"//{stranger.host}/stolen"}))]
            other = registry.open_blob(blob)
            with pytest.raises(AuthenticationError):
                other.read_into(0, memoryview(bytearray(7)))
            stranger.faults = [Fault("PUT /upload", reply=(201, {}))]
            basic.faults = [Fault("POST", reply=(202, {"Location": f"http://{stranger.host}/upload?x=y"}))]
            registry.copy_blob(describe(b"other"), lambda offset: iter([b"other"[offset:]]), lambda size: None)
            assert len(stranger.seen) == 3
            assert stranger.requests("PUT")[0].path == f"/upload?x=y&digest={describe(b'other').digest}"
        for request in stranger.seen:
            assert "authorization" not in request.headers
            assert "cookie" not in request.headers
        assert all("authorization" in request.headers for request in basic.seen[1:])
    finally:
        stranger.close()


# -- tokens


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenService]:
    service = TokenService(tmp_path_factory.mktemp("tokens"))
    yield service
    service.close()


@pytest.fixture(scope="module")
def token_server(tokens: TokenService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("token-registry"), token=tokens) as server:
        yield server


@pytest.fixture
def guarded(token_server: DockerRegistry, tokens: TokenService) -> Iterator[FaultProxy]:
    tokens.given.clear()
    tokens.anonymous, tokens.age, tokens.validity = False, 0, 300
    proxy = FaultProxy(token_server.host)
    yield proxy
    proxy.close()


def login(tmp_path: Path, host: str, **entry: str) -> None:
    write_json(tmp_path / "home/.docker/config.json", {"auths": {host: entry or {"auth": AUTH}}})


@needs_docker_registry
def test_tokens_are_fetched_once_for_each_purpose(guarded: FaultProxy, tokens: TokenService, tmp_path: Path) -> None:
    login(tmp_path, guarded.host)
    with connected(guarded.host, "team/app") as registry, connected(guarded.host, "team/other") as other:
        blob = registry.write_blob(b"content", SEGMENT)
        for _ in range(3):
            put_image(registry, [blob])
            registry.manifest()
            registry.read_blob(blob, limit=10)
        assert [scope for scope, _ in tokens.given] == ["repository:team/app:pull", "repository:team/app:pull,push"]
        other.prefer_mounting(registry)
        other.copy_blob(blob, lambda offset: iter([b"content"[offset:]]), lambda size: None)
        assert "repository:team/app:pull" in tokens.given[-1][0]
        assert "repository:team/other:pull,push" in tokens.given[-1][0]
        assert not guarded.requests("^PUT .*team/other"), "it was mounted, not uploaded"


@needs_docker_registry
def test_identity_token(guarded: FaultProxy, tokens: TokenService, tmp_path: Path) -> None:
    login(tmp_path, guarded.host, identitytoken=tokens.identity_token)
    with connected(guarded.host) as registry:
        put_image(registry, [registry.write_blob(b"content", SEGMENT)])
    assert {proof for _, proof in tokens.given} == {"Identity"}


@needs_docker_registry
def test_anonymous_token(guarded: FaultProxy, tokens: TokenService, tmp_path: Path) -> None:
    login(tmp_path, guarded.host)
    with connected(guarded.host) as registry:
        manifest = put_image(registry, [])
    (tmp_path / "home/.docker/config.json").unlink()
    with connected(guarded.host) as registry:
        with pytest.raises(AuthenticationError):
            registry.manifest()
        tokens.anonymous = True
        assert registry.manifest().digest == manifest.digest
        with pytest.raises(AuthenticationError):
            registry.write_blob(b"other", SEGMENT)


@needs_docker_registry
def test_token_that_runs_out_is_replaced(guarded: FaultProxy, tokens: TokenService, tmp_path: Path) -> None:
    login(tmp_path, guarded.host)
    with connected(guarded.host) as registry:
        blob = registry.write_blob(b"0123456789" * 1000, SEGMENT)
        opened = registry.open_blob(blob)
        tokens.given.clear()
        # Refused in the middle, by the clock of the registry or by a revocation.
        for status in (401, 403):
            refusal = {
                "WWW-Authenticate": f'Bearer realm="{tokens.url}",service="tests",scope="repository:test/repo:pull"'
            }
            guarded.faults = [Fault("GET .*blobs", reply=(status, refusal))]
            buffer = memoryview(bytearray(10))
            opened.read_into(5000, buffer)
            assert buffer == b"0123456789"
        assert len(tokens.given) == 2
        # What never becomes valid is not asked for without end.
        tokens.age = 100_000
        guarded.faults = [Fault("GET .*blobs", times=-1, reply=(401, refusal))]
        with pytest.raises(AuthenticationError):
            opened.read_into(0, memoryview(bytearray(10)))
        assert len(tokens.given) <= 4


@needs_docker_registry
def test_token_near_its_end_is_not_sent(guarded: FaultProxy, tokens: TokenService, tmp_path: Path) -> None:
    login(tmp_path, guarded.host)
    with connected(guarded.host) as registry:
        tokens.validity = 1  # used for as long as it lasts, at least a second
        registry.has_blob(describe(b"x"))
        time.sleep(1.1)
        tokens.validity = 300
        registry.has_blob(describe(b"x"))
        assert "authorization" not in guarded.seen[2].headers
        assert "authorization" in guarded.seen[3].headers


@needs_docker_registry
def test_refused_credentials_at_the_token_service(guarded: FaultProxy, tmp_path: Path) -> None:
    login(tmp_path, guarded.host, auth=b64_encode(b"owner:wrong"))
    with connected(guarded.host) as registry, pytest.raises(AuthenticationError, match="refuses the credentials of"):
        registry.manifest()
    assert len(guarded.seen) == 1


def test_odd_token_services(tmp_path: Path) -> None:
    service, asking = FaultProxy("127.0.0.1:1"), FaultProxy("127.0.0.1:1")
    login(tmp_path, asking.host)
    ask = {"WWW-Authenticate": f'Bearer realm="http://{service.host}/token",service="s"'}
    asking.faults = [Fault("", times=-1, reply=(401, ask))]
    long = b'{"token": "%s"}' % (b"a" * 70_000)
    try:
        for body in (b"", b"[]", b"{}", b'{"token": 5}', b'{"token": ""}', b'{"token": "a\\nb"}', long):
            service.faults = [Fault("", times=-1, reply=(200, {}), body=body)]
            refused(asking.host, TransportError, "without a token")
        service.faults = [Fault("", times=-1, reply=(200, {}), body=b" " * (2 << 20))]
        refused(asking.host, TransportError, "more than")
        service.faults = [Fault("", reply=(503, {})), Fault("", times=-1, reply=(404, {}))]
        refused(asking.host, NotFoundError, "a token")
        for realm in ("ftp://x/", "", "//x", "http://user:pass@x/"):
            asking.faults = [Fault("", times=-1, reply=(401, {"WWW-Authenticate": f'Bearer realm="{realm}"'}))]
            refused(asking.host, TransportError, "no address")
    finally:
        service.close()
        asking.close()


# -- TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def tls_server(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with running(tmp_path_factory.mktemp("tls"), tls=authority, client_ca=authority) as server:
        yield server


@needs_docker_registry
def test_tls_with_a_client_certificate(tls_server: DockerRegistry, authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("client")
    options = {"plain_http": False, "ca_file": str(authority.file)}
    with connected(tls_server.host, **options, cert_file=str(certificate), key_file=str(key)) as registry:
        blob = registry.write_blob(b"content", SEGMENT)
        put_image(registry, [blob])
        assert registry.read_blob(blob, limit=10) == b"content"
    both = tmp_path / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    with connected(tls_server.host, **options, cert_file=str(both)) as registry:
        assert registry.has_blob(blob)
    refused(tls_server.host, TransportError, r"(?i)certificate", **options)


@needs_docker_registry
def test_tls_that_is_not_trusted(tls_server: DockerRegistry, tmp_path: Path) -> None:
    refused(tls_server.host, TransportError, r"not trusted.*--ca-file", plain_http=False)
    other = Authority.create(tmp_path / "other")
    refused(tls_server.host, TransportError, r"not trusted.*--ca-file", plain_http=False, ca_file=str(other.file))


def test_certificate_of_another_address(authority: Authority) -> None:
    proxy = FaultProxy("127.0.0.1:1", tls=authority, address="127.0.0.2")
    try:
        refused(proxy.host, TransportError, r"not trusted.*mismatch", plain_http=False, ca_file=str(authority.file))
    finally:
        proxy.close()
    assert proxy.seen == []


@needs_registries
def test_certificate_that_has_expired_or_vouches_for_itself(authority: Authority, tmp_path: Path) -> None:
    expired = OciServer(tmp_path / "expired", tls=authority.issue("expired", days=-1))
    try:
        trusted = {"plain_http": False, "ca_file": str(authority.file)}
        refused(expired.host, TransportError, r"not trusted: certificate has expired", **trusted)
    finally:
        expired.stop()
    itself = Authority.create(tmp_path / "itself")
    files = itself.issue("itself")
    server = OciServer(tmp_path / "self", tls=files)
    try:
        refused(server.host, TransportError, r"not trusted.*--ca-file", plain_http=False)
        with connected(server.host, plain_http=False, ca_file=str(itself.file)) as registry:
            assert registry.write_blob(b"content", SEGMENT).size == 7
    finally:
        server.stop()


@needs_docker_registry
def test_tls_and_none_are_told_apart(tls_server: DockerRegistry, basic_server: DockerRegistry) -> None:
    refused(basic_server.host, TransportError, r"does not speak TLS.*--plain-http", plain_http=False)
    refused(tls_server.host, TransportError, "400", plain_http=True)


@pytest.mark.parametrize("name", ["ca_file", "cert_file"])
def test_unusable_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.pem").write_text("nothing")
    for file in ("file.pem", "absent.pem"):
        refused("127.0.0.1:1", UsageError, file, plain_http=False, **{name: str(tmp_path / file)})


def test_encrypted_key_does_not_ask(authority: Authority, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    (tmp_path / "key.pem").write_bytes(key)
    options = {"cert_file": str(authority.file), "key_file": str(tmp_path / "key.pem")}
    refused("127.0.0.1:1", UsageError, "unencrypted", plain_http=False, **options)


def test_https_never_becomes_http(authority: Authority, tmp_path: Path) -> None:
    plain, secure = FaultProxy("127.0.0.1:1"), FaultProxy("127.0.0.1:1", tls=authority)
    login(tmp_path, secure.host)
    options = {"plain_http": False, "ca_file": str(authority.file), "io_timeout": 2.0}
    try:
        secure.faults = [Fault("", reply=(307, {"Location": f"http://{plain.host}/x"}))]
        refused(secure.host, TransportError, "https to http", **options)
        ask = {"WWW-Authenticate": f'Bearer realm="http://{plain.host}/token"'}
        secure.faults = [Fault("", reply=(401, ask))]
        refused(secure.host, TransportError, "without TLS", **options)
        secure.faults = [
            Fault("POST", times=-1, reply=(202, {"Location": f"http://{plain.host}/upload"})),
            Fault("HEAD", reply=(404, {})),
        ]
        with connected(secure.host, **options) as registry, pytest.raises(TransportError, match="without TLS"):
            registry.write_blob(b"content", SEGMENT)
        assert plain.seen == []
    finally:
        plain.close()
        secure.close()
