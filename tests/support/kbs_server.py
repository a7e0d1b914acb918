"""A server that speaks the KBS protocol as Trustee does, over TLS, with another JOSE implementation; its certificate.

For the client's tests alone: what it does wrong on purpose is set in `KbsServer.faults`, by the step (answers cut short
or too large, malformed, altered or for another session; connections that end; versions that the broker does not speak;
JWEs of another library). None of it can the real broker be made to do, so it stays beside it; whatever goes right, and
every refusal of the broker's own, is tested against the broker.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jwcrypto import jwe, jwk

ERRORS = "https://github.com/confidential-containers/kbs/errors/"
Reply = tuple[int, dict[str, str], bytes]


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test broker")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = directory / "kbs.crt", directory / "kbs.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, private


class KbsServer:
    """The state: sessions, resources, the version it speaks, what was asked, what it does wrong."""

    def __init__(self, version: str = "0.4.0") -> None:
        self.version = version
        self.resources: dict[str, bytes] = {}
        self.denied: set[str] = set()
        self.sessions: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.queries: list[str] = []
        self.faults: dict[str, Callable[[Reply], Reply | None]] = {}
        self.url = ""

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Reply | None:
        route, _, query = path.partition("?")
        step = route.removeprefix("/kbs/v0/").split("/")[0]
        self.asked.append(step)
        if step == "auth":
            reply = self._auth(json.loads(body))
        elif step == "attest":
            reply = self._attest(self._session(headers), json.loads(body))
        else:
            self.queries.append(query)
            reply = self._resource(self._session(headers), route.removeprefix("/kbs/v0/resource/"))
        return self.faults[step](reply) if step in self.faults else reply

    def _session(self, headers: Any) -> dict[str, Any] | None:
        name, _, value = (headers.get("Cookie") or "").partition("=")
        return self.sessions.get(value) if name == "kbs-session-id" else None

    def _auth(self, request: dict[str, Any]) -> Reply:
        if request["version"] != self.version:
            return error(401, "ProtocolVersion", "not my version")
        if self.version == "0.4.0" and not isinstance(request["extra-params"], dict):
            return error(400, "Malformed", "extra-params")
        session = uuid.uuid4().hex
        nonce = base64.b64encode(uuid.uuid4().bytes * 2).decode()
        self.sessions[session] = {"nonce": nonce, "tee": request["tee"], "key": None}
        return 200, {"Set-Cookie": f"kbs-session-id={session}"}, encoded({"nonce": nonce, "extra-params": ""})

    def _attest(self, session: dict[str, Any] | None, request: dict[str, Any]) -> Reply:
        if session is None:
            return error(401, "RcarAttestFailed", "session not found")
        bound: dict[str, Any]
        if self.version == "0.2.0":
            key, evidence = request["tee-pubkey"], request["tee-evidence"]
            bound = {"nonce": session["nonce"], "tee-pubkey": key}
        else:
            assert set(request) == {"init-data", "runtime-data", "tee-evidence"}
            key, evidence = request["runtime-data"]["tee-pubkey"], request["tee-evidence"]["primary_evidence"]
            assert request["runtime-data"]["nonce"] == session["nonce"]
            bound = {"additional-evidence": "", "nonce": session["nonce"], "tee-pubkey": key}
        wanted = hashlib.sha384(rfc8785.dumps(bound)).digest()
        if session["tee"] != "sample" or base64.b64decode(evidence["report_data"]) != wanted:
            return error(401, "AttestationFailed", "the report data is not the expected")
        session["key"] = key
        return 200, {}, encoded({"token": "e30.e30.e30"})

    def _resource(self, session: dict[str, Any] | None, path: str) -> Reply:
        if session is None or session["key"] is None:
            return error(401, "AttestationRequired", "no session")
        if path in self.denied:
            return error(401, "PolicyDeny", "the policy does not allow it")
        if path not in self.resources:
            return error(404, "ResourceNotFound", "no such resource")
        header = {"alg": session["key"]["alg"], "enc": "A256GCM"}
        token = jwe.JWE(self.resources[path], json.dumps(header))
        token.add_recipient(jwk.JWK(**{name: one for name, one in session["key"].items() if name != "alg"}))
        return 200, {}, token.serialize().encode()


def error(status: int, kind: str, detail: str) -> Reply:
    return status, {}, encoded({"type": ERRORS + kind, "detail": detail})


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


@contextmanager
def serving(server: KbsServer, certificate: tuple[Path, Path] | None) -> Iterator[KbsServer]:
    """Serve on a port of its own; without a certificate in clear text."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            reply = server.answer(self.command, self.path, self.headers, body)
            if reply is None:
                self.close_connection = True
                return
            status, headers, content = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 -- http.server's name

        def log_message(self, *words: Any) -> None:
            return

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            return

    listener = Quiet(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        listener.socket = context.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "https"
    server.url = f"{scheme}://127.0.0.1:{listener.server_address[1]}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()
