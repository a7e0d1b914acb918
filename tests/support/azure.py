"""Azure's services for secure key release on loopback: MAA, a vault, the managed identity, and the sidecar.

They do what the real ones do as far as keys and signatures go: MAA signs a token over the runtime data that the report
is bound to, the vault checks that token and wraps its key for the key in it.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA1, SHA256
from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

from encfs.attestation.snp import parse_report


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


SIGNER = rsa.generate_private_key(65537, 2048)


@dataclass
class Azure:
    """`keys` are what the vault holds: their type and their bytes (raw, or PKCS#8 in DER)."""

    keys: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    #: What the release policy wants.
    host_data: bytes = bytes(32)
    signer: rsa.RSAPrivateKey = field(default_factory=lambda: SIGNER)
    wrapping: str = "RSA_AES_KEY_WRAP_256"
    identity: str = "identity-token"
    asked: list[str] = field(default_factory=list)
    #: Changes an answer before it is sent, by path.
    faults: dict[str, Any] = field(default_factory=dict)

    def attest(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        evidence = json.loads(decode(request["report"]))
        report = parse_report(decode(evidence["SnpReport"]))
        runtime = decode(request["runtimeData"]["data"])
        policy = decode(request["initTimeData"]["data"])
        assert b"CERTIFICATE" in decode(evidence["VcekCertChain"])
        assert json.loads(decode(evidence["Endorsements"]))["Uvm"]
        if report.report_data[:32] != hashlib.sha256(runtime).digest():
            return 400, {"error": {"code": "InvalidParameter", "message": "the runtime data is not the report's"}}
        claims = {"x-ms-runtime": json.loads(runtime), "x-ms-sevsnpvm-hostdata": hashlib.sha256(policy).hexdigest()}
        return 200, {"token": self.token(claims)}

    def token(self, claims: dict[str, Any]) -> str:
        head = encode(json.dumps({"alg": "RS256"}).encode())
        signed = f"{head}.{encode(json.dumps(claims).encode())}"
        return f"{signed}.{encode(self.signer.sign(signed.encode(), padding.PKCS1v15(), SHA256()))}"

    def attest_guest(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Of virtual machines: `azure_guest`."""
        return 404, {"error": {"code": "NotFound", "message": str(sorted(request))}}

    def certification(self) -> dict[str, str]:
        """What the metadata service has for this machine."""
        return {}

    def td_quote(self, _request: dict[str, Any]) -> dict[str, str]:
        return {}

    def release(self, name: str, request: dict[str, Any], authorization: str | None) -> tuple[int, dict[str, Any]]:
        if authorization != f"Bearer {self.identity}":
            return 401, {"error": {"code": "Unauthorized", "message": "AKV10000: Request is missing a Bearer token"}}
        if name not in self.keys:
            return 404, {"error": {"code": "KeyNotFound", "message": "A key with this name was not found"}}
        signed, _, signature = request["target"].rpartition(".")
        try:
            self.signer.public_key().verify(decode(signature), signed.encode(), padding.PKCS1v15(), SHA256())
        except InvalidSignature:
            return 403, {"error": {"code": "Forbidden", "message": "the target environment attestation is invalid"}}
        claims = json.loads(decode(signed.split(".")[1]))
        if claims["x-ms-sevsnpvm-hostdata"] != self.host_data.hex():
            return 403, {"error": {"code": "Forbidden", "message": "the release policy is not met"}}
        jwk = claims["x-ms-runtime"]["keys"][0]
        assert jwk["key_ops"] == ["encrypt"]
        numbers = rsa.RSAPublicNumbers(int.from_bytes(decode(jwk["e"])), int.from_bytes(decode(jwk["n"])))
        digest = SHA1 if self.wrapping == "CKM_RSA_AES_KEY_WRAP" else SHA256
        kind, content = self.keys[name]
        aes = os.urandom(32)
        wrapped = numbers.public_key().encrypt(aes, padding.OAEP(padding.MGF1(digest()), digest(), None))
        hsm = {
            "schema_version": "1.0",
            "header": {"kid": name, "alg": "dir", "enc": self.wrapping},
            "ciphertext": encode(wrapped + aes_key_wrap_with_padding(aes, content)),
        }
        key = {"kty": f"{kind}-HSM", "kid": name, "key_hsm": encode(json.dumps(hsm).encode())}
        payload = {"request": {}, "response": {"key": {"key": key}}}
        return 200, {"value": f"{encode(b'{}')}.{encode(json.dumps(payload).encode())}.{encode(b'signature')}"}

    def from_sidecar(self, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert set(request) == {"maa_endpoint", "akv_endpoint", "kid"}
        assert not any("://" in str(value) for value in request.values())
        if request["kid"] not in self.keys:
            return 403, {"error": "release failed: the release policy is not met"}
        _, content = self.keys[request["kid"]]
        jwk = {"kty": "oct", "k": encode(content), "kid": request["kid"], "key_ops": ["encrypt", "decrypt"]}
        return 200, {"key": json.dumps(jwk)}


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/metadata/THIM/amd/certification":
            self._answer(200, self._azure.certification())
            return
        good = self.path.startswith("/metadata/identity/oauth2/token?") and self.headers["Metadata"] == "true"
        self._answer(*((200, {"access_token": self._azure.identity}) if good else (400, {"error": "bad request"})))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.partition("?")[0]
        if path == "/attest/SevSnpVM":
            self._answer(*self._azure.attest(request))
        elif path == "/attest/AzureGuest":
            self._answer(*self._azure.attest_guest(request))
        elif path == "/acc/tdquote":
            self._answer(200, self._azure.td_quote(request))
        elif path == "/key/release":
            self._answer(*self._azure.from_sidecar(request))
        else:
            name = path.removeprefix("/keys/").removesuffix("/release")
            self._answer(*self._azure.release(name, request, self.headers["Authorization"]))

    @property
    def _azure(self) -> Azure:
        return self.server.azure  # type: ignore[attr-defined,no-any-return]

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        path = self.path.partition("?")[0]
        self._azure.asked.append(path)
        if (fault := self._azure.faults.get(path)) is not None:
            status, document = fault(status, document)
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_words: object) -> None:
        return


@contextmanager
def serving(azure: Azure, certificate: tuple[Path, Path] | None) -> Iterator[int]:
    """All services on one port of loopback, with TLS where there is a certificate."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.azure = azure  # type: ignore[attr-defined]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
