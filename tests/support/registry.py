"""Real registries of two kinds for tests, and a proxy in front of them that does what networks and bad registries do.

`DockerRegistry` is Debian's docker-registry on a free loopback port, optionally with TLS, a client certificate, basic
or token authentication. `FaultProxy` forwards to it and applies faults on the way. Nothing here talks beyond loopback.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from encfs.encoding import b64_encode, b64url_encode

USERNAME, PASSWORD = "owner", "correct horse"
#: bcrypt of PASSWORD, as `htpasswd -B` writes it.
_HTPASSWD = f"{USERNAME}:$2b$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"

DOCKER_REGISTRY = shutil.which("docker-registry")


#: Ports that servers of this process have, bound as long as it lives.
_reserved: list[socket.socket] = []


def reserved_port() -> int:
    """A port of loopback that nobody else on this machine gets, for a server that has to be told which one is its own.

    The socket stays bound and never listens: a server that sets SO_REUSEADDR, as Go's do, can bind the same port beside
    it, as often as it is started, and nobody can who asks the kernel for any free port.
    """
    socket_ = socket.socket()
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    socket_.bind(("127.0.0.1", 0))
    _reserved.append(socket_)
    return int(socket_.getsockname()[1])


# -- certificates


@dataclass(frozen=True)
class Authority:
    """A certificate authority of one test, and what it issued."""

    directory: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, directory: Path) -> Authority:
        directory.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        authority = cls(directory, key, _certificate("test authority", key, "test authority", key, ca=True))
        authority.file.write_bytes(authority.certificate.public_bytes(serialization.Encoding.PEM))
        return authority

    @property
    def file(self) -> Path:
        return self.directory / "ca.pem"

    def issue(self, name: str, address: str = "127.0.0.1", *, days: float = 1.0) -> tuple[Path, Path]:
        """Files of a certificate for `name` at an address, valid for so many days from now, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, "test authority", self.key, ca=False, address=address, days=days)
        files = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    ca: bool,
    address: str = "127.0.0.1",
    days: float = 1.0,
) -> x509.Certificate:
    import ipaddress

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if ca:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    else:
        names = [x509.IPAddress(ipaddress.ip_address(address))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


# -- registries


class Server(ABC):
    """A registry in a process of its own, with its log in a directory; `stop` and `start` as often as needed."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = reserved_port()
        self.host = f"127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What starts it."""

    def start(self) -> None:
        command = self.command()
        log = open(self.directory / "log", "ab")  # noqa: SIM115 - the process has it
        with log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env={"PATH": os.environ["PATH"]})
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, f"{command[0]} does not listen"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(60)
            self._process = None


class OciServer(Server):
    """tests/registries/ociserver: another implementation, of OCI 1.1, in memory: stopped, it forgets everything."""

    def __init__(self, directory: Path, *, tls: tuple[Path, Path] | None = None) -> None:
        """`tls`: files of a certificate and its key."""
        super().__init__(directory)
        self._options = [] if tls is None else ["-certificate", str(tls[0]), "-key", str(tls[1])]
        self.start()

    def command(self) -> list[str]:
        return [self.program(), "-address", self.host, *self._options]

    @staticmethod
    @functools.cache
    def can_be_built() -> bool:
        """Whether there is a Go that is new enough."""
        if shutil.which("go") is None:
            return False
        said = subprocess.run(["go", "version"], capture_output=True, text=True, check=False).stdout
        found = re.match(r"go version go1\.(\d+)", said)
        return found is not None and int(found[1]) >= 24

    @staticmethod
    @functools.cache
    def program() -> str:
        """Its path, built if need be."""
        script = Path(__file__).parents[2] / "scripts/build-test-registry"
        return subprocess.run([script], check=True, stdout=subprocess.PIPE, text=True, timeout=1800).stdout.strip()


class DockerRegistry(Server):
    """Debian's docker-registry with its storage in a directory."""

    def __init__(
        self,
        directory: Path,
        *,
        tls: Authority | None = None,
        client_ca: Authority | None = None,
        basic: bool = False,
        token: TokenService | None = None,
        delete: bool = False,
        proxy_of: str = "",
    ) -> None:
        """`proxy_of`: the URL of the registry whose pull-through cache it is."""
        super().__init__(directory)
        http_section: dict[str, object] = {"addr": self.host, "secret": "a secret of the tests"}
        if tls is not None:
            certificate, key = tls.issue("server")
            http_section["tls"] = {"certificate": str(certificate), "key": str(key)}
            if client_ca is not None:
                http_section["tls"]["clientcas"] = [str(client_ca.file)]
        config: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(directory / "storage")},
                "delete": {"enabled": delete},
            },
            "http": http_section,
        }
        if proxy_of:
            config["proxy"] = {"remoteurl": proxy_of}
        if basic:
            (directory / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
        if token is not None:
            config["auth"] = {
                "token": {
                    "realm": token.url,
                    "service": "tests",
                    "issuer": "tests",
                    "rootcertbundle": str(token.authority.file),
                }
            }
        self._config = directory / "config.yml"
        self._config.write_text(json.dumps(config))  # JSON is YAML
        self.start()

    def command(self) -> list[str]:
        assert DOCKER_REGISTRY is not None
        return [DOCKER_REGISTRY, "serve", str(self._config)]

    def blob_file(self, digest: str) -> Path:
        """Where it keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self.directory / f"storage/docker/registry/v2/blobs/sha256/{name[:2]}/{name}/data"


# -- a token service (distribution, "Token Authentication Specification" and "OAuth2 Token Authentication")


class TokenService:
    """Issues tokens that a docker-registry accepts, for USERNAME and PASSWORD, an identity token, or anybody."""

    def __init__(self, directory: Path, *, anonymous: bool = False, validity: int = 300) -> None:
        self.authority = Authority.create(directory)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._certificate = _certificate("tokens", self._key, "test authority", self.authority.key, ca=False)
        self.anonymous = anonymous
        self.validity = validity
        self.identity_token = "an identity token"
        #: Scopes of each token that was given out, and how the client proved who it is.
        self.given: list[tuple[str, str]] = []
        #: Put into every token as its age: with it, tokens have run out when they are issued.
        self.age = 0
        service = self

        class Handler(_QuietHandler):
            def do_GET(self) -> None:
                query = parse_qs(urlsplit(self.path).query)
                service._answer(self, " ".join(query.get("scope", [])).split(), self.headers.get("Authorization", ""))

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                proof = f"Identity {form.get('refresh_token', [''])[0]}"
                service._answer(self, form.get("scope", [""])[0].split(), proof)

        self._server = _Server(Handler)
        self.url = f"http://127.0.0.1:{self._server.port}/token"

    def _answer(self, handler: _QuietHandler, scopes: list[str], proof: str) -> None:
        basic = "Basic " + base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
        known = proof in (basic, f"Identity {self.identity_token}")
        if not known and not (self.anonymous and not proof):
            handler.reply(401, b"{}")
            return
        self.given.append((" ".join(scopes), proof.split(" ")[0]))
        token = self._token(scopes if known else [scope for scope in scopes if "push" not in scope])
        handler.reply(200, json.dumps({"token": token, "expires_in": self.validity}).encode())

    def _token(self, scopes: list[str]) -> str:
        now = int(time.time()) - self.age
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        chain = b64_encode(self._certificate.public_bytes(serialization.Encoding.DER))
        header = {"typ": "JWT", "alg": "ES256", "x5c": [chain]}
        claims = {
            "iss": "tests",
            "sub": USERNAME,
            "aud": "tests",
            "exp": now + self.validity,
            "nbf": now - 10,
            "iat": now,
            "jti": os.urandom(8).hex(),
            "access": access,
        }
        signed = b64url_encode(json.dumps(header).encode()) + "." + b64url_encode(json.dumps(claims).encode())
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{b64url_encode(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def close(self) -> None:
        self._server.close()


# -- servers of the tests' own


class _QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave at once: without this, a small answer waits for an acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        return

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, handler: type[BaseHTTPRequestHandler], tls: Authority | None = None, address: str = "127.0.0.1"
    ) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.port = int(self.server_address[1])
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls.issue("proxy", address))
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that clients drop are what these servers are for."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()


@dataclass
class Seen:
    """One request that went through the proxy."""

    method: str
    path: str
    headers: dict[str, str]
    sent: int = 0
    status: int = 0

    @property
    def range(self) -> str:
        return self.headers.get("range", "")


@dataclass
class Fault:
    """What happens to requests whose "METHOD /path" matches `pattern`, `times` times (-1: always), after `skip` others.

    Either `reply` answers instead of the registry, or the others change the exchange with it.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    #: Answer with a status and headers.
    reply: tuple[int, dict[str, str]] | None = None
    body: bytes = b""
    #: Called in place of everything else.
    act: Callable[[_ProxyHandler], None] | None = None
    #: Close the connection after so many bytes of the response's body.
    cut: int | None = None
    #: Close the connection after so many bytes of the request's body were passed on.
    cut_request: int | None = None
    #: Seconds to wait before the response; between pieces of 4 KiB of its body.
    delay: float = 0.0
    drip: float = 0.0
    #: Flip a bit of the response's body at this offset.
    corrupt: int | None = None
    #: Close the connection in place of the answer, which the registry has given.
    lose: bool = False
    #: Do not pass on the Range header.
    no_range: bool = False
    #: Replace headers of the response.
    headers: dict[str, str] = field(default_factory=dict)


class FaultProxy:
    """An HTTP proxy in front of one registry, at `host`; `faults` may be changed at any time."""

    def __init__(
        self, upstream: str, *, tls: Authority | None = None, address: str = "127.0.0.1", latency: float = 0.0
    ) -> None:
        """`address` is what its certificate says."""
        self.upstream = upstream
        self.latency = latency
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_ProxyHandler):
            owner = proxy

        self._server = _Server(Handler, tls, address)
        self.port = self._server.port
        self.host = f"127.0.0.1:{self.port}"

    def take_fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if not fault.times or not re.search(fault.pattern, line):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def requests(self, pattern: str) -> list[Seen]:
        """The requests so far whose "METHOD /path" matches."""
        return [item for item in self.seen if re.search(pattern, f"{item.method} {item.path}")]

    def close(self) -> None:
        self._server.close()


class _ProxyHandler(_QuietHandler):
    owner: FaultProxy

    def handle_any(self) -> None:
        record = Seen(self.command, self.path, {name.lower(): value for name, value in self.headers.items()})
        self.record = record
        self.owner.seen.append(record)
        if self.owner.latency:
            time.sleep(self.owner.latency)
        fault = self.owner.take_fault(f"{self.command} {self.path}") or Fault("")
        if fault.act is not None:
            fault.act(self)
            return
        if fault.reply is not None:
            self._skip_request_body()
            time.sleep(fault.delay)
            record.status = fault.reply[0]
            self.send_response(fault.reply[0])
            for name, value in {"Content-Length": str(len(fault.body)), **fault.reply[1]}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(fault.body)
            return
        self._forward(fault, record)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = handle_any  # noqa: N815 - names of the base class

    def _skip_request_body(self) -> None:
        rest = int(self.headers.get("Content-Length", 0))
        while rest > 0 and (piece := self.rfile.read(min(rest, 1 << 20))):
            rest -= len(piece)

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _forward(self, fault: Fault, record: Seen) -> None:
        upstream = http.client.HTTPConnection(self.owner.upstream, timeout=30)
        try:
            try:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if not (fault.no_range and name.lower() == "range"):
                        upstream.putheader(name, value)
                upstream.endheaders()
            except OSError:
                self._skip_request_body()
                self.reply(502)
                return
            rest = int(self.headers.get("Content-Length", 0))
            passed = 0
            while rest > 0 and (piece := self.rfile.read(min(rest, 64 << 10))):
                rest -= len(piece)
                if fault.cut_request is not None and passed + len(piece) > fault.cut_request:
                    upstream.send(piece[: fault.cut_request - passed])
                    upstream.close()
                    self.hang_up()
                    return
                upstream.send(piece)
                passed += len(piece)
            response = upstream.getresponse()
            time.sleep(fault.delay)
            if fault.lose:
                self.hang_up()
                return
            self._pass_on(response, fault, record)
        except (OSError, http.client.HTTPException):
            self.hang_up()
        finally:
            upstream.close()

    def _pass_on(self, response: http.client.HTTPResponse, fault: Fault, record: Seen) -> None:
        record.status = response.status
        self.send_response_only(response.status)
        changed = {name.lower(): value for name, value in fault.headers.items()}
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding") and name.lower() not in changed:
                self.send_header(name, value.replace(self.owner.upstream, self.owner.host))
        for name, value in fault.headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        for piece in _pieces(response, 4096 if fault.drip else 256 << 10):
            content = bytearray(piece)
            if fault.corrupt is not None and record.sent <= fault.corrupt < record.sent + len(content):
                content[fault.corrupt - record.sent] ^= 1
            if fault.cut is not None and record.sent + len(content) > fault.cut:
                self.wfile.write(content[: fault.cut - record.sent])
                self.hang_up()
                return
            self.wfile.write(content)
            record.sent += len(content)
            time.sleep(fault.drip)


def _pieces(response: http.client.HTTPResponse, size: int) -> Iterator[bytes]:
    while piece := response.read(size):
        yield piece
