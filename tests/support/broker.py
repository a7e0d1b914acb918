"""Real brokers for tests: made and run by the commands, in processes of their own; and a client that can misbehave."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import secrets
import signal
import sqlite3
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import imagetool.cli as imagetool_cli
from encfs.attestation.kbs import digest_of_json
from encfs.console import commandline
from encfs.encoding import b64_encode, b64url_decode
from encfs.kbs import jwe, protocol
from encfs.keys.jwk import PrivateKey
from encfs.keys.keyring import create_keyring, parse_keyring
from encfs.keys.providers import provider_from_uri
from encfs.keys.secrets import SymmetricKey

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PATH = "default/key/chat"
SAMPLE_POLICY = '[key."default/key/*"]\ntee = "sample"\n'


def imagetool(*words: str | Path, code: int = 0, cwd: Path | None = None) -> dict[str, Any]:
    """A command's document; its exit code must be `code`. In this process, which spares loading everything anew."""
    if cwd is not None or words[:2] == ("broker", "serve"):
        return _imagetool_by_itself(*words, code=code, cwd=cwd)
    output, errors = io.BytesIO(), io.BytesIO()
    # Kept: a wrapper that is collected closes what it wraps.
    stdout, stderr = (io.TextIOWrapper(one, write_through=True) for one in (output, errors))
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        commandline.main(imagetool_cli.app, imagetool_cli.PROGRAM, ["--json", *map(str, words)])
    assert end.value.code == code, errors.getvalue()
    found: dict[str, Any] = json.loads(output.getvalue())
    return found | {"stderr": errors.getvalue().decode()}


def _imagetool_by_itself(*words: str | Path, code: int, cwd: Path | None) -> dict[str, Any]:
    done = subprocess.run(
        [BIN / "imagetool", "--json", *words], capture_output=True, text=True, check=False, cwd=cwd, timeout=120
    )
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found | {"stderr": done.stderr}


def make_broker(directory: Path, *options: str, policy: str = SAMPLE_POLICY, path: str = PATH) -> Path:
    """A broker with a policy and one key, whose file is beside its directory: `kek.jwk`."""
    imagetool("broker", "init", directory, *options)
    key = directory.parent / "kek.jwk"
    if not key.exists():
        imagetool("keygen", "--type", "oct", "-o", key)
    set_policy(directory, policy)
    imagetool("broker", "key", "add", directory, path, "--kek", key)
    return directory


def configure(directory: Path, **members: int | str) -> None:
    """Change members of `broker.toml`; a broker takes them over when it starts."""
    config = directory / "broker.toml"
    kept = [line for line in config.read_text().splitlines() if line.partition(" = ")[0] not in members]
    config.write_text("\n".join([*kept, *(f"{name} = {json.dumps(value)}" for name, value in members.items()), ""]))


def set_policy(directory: Path, text: str, *, code: int = 0) -> dict[str, Any]:
    file = directory.parent / f"policy-{secrets.token_hex(4)}.toml"
    file.write_text(text)
    return imagetool("broker", "policy", "set", directory, file, code=code)


@dataclass
class Served:
    """A running broker."""

    directory: Path
    url: str
    process: subprocess.Popen[str]
    errors: Path

    @property
    def ca(self) -> Path:
        return self.directory / "tls.crt"

    def uri(self, path: str = PATH, more: str = "") -> str:
        return f"kbs:{self.url}/{path}?ca={self.ca}&tee=sample&timeout=30{more}"

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self) -> None:
        """The host dies: nobody says goodbye."""
        for pid in [self.process.pid, *self.workers()]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)


@contextmanager
def serving(
    directory: Path, *options: str, listen: str = "127.0.0.1:0", command: Sequence[str | Path] = (BIN / "imagetool",)
) -> Iterator[Served]:
    errors = directory.parent / f"serve-{secrets.token_hex(4)}.err"
    words = ["broker", "serve", directory, "--listen", listen, "--demo", "--workers", "2", *options, "--json"]
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    try:
        assert line, errors.read_text()
        served = Served(directory, json.loads(line)["url"], process, errors)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        process.stdout.close()


@dataclass
class Answer:
    status: int
    body: bytes
    headers: Message

    @property
    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def kind(self) -> str:
        return protocol.parse_error(self.body).kind


Evidence = Callable[[bytes], object]


def sample(report_data: bytes) -> object:
    return {"svn": "1", "report_data": b64_encode(report_data)}


@dataclass
class Handshake:
    """One handshake of a client that does what it is told."""

    url: str
    ca: Path | None = None
    version: str = "0.4.0"
    tee: str = "sample"
    evidence: Evidence = sample
    #: The client's own address.
    source: str = "127.0.0.1"
    cookie: str = ""
    nonce: str = ""
    key: PrivateKey = field(default_factory=jwe.session_key)

    def request(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Answer:
        address = urlsplit(self.url)
        assert address.hostname is not None
        connection: http.client.HTTPConnection
        if address.scheme == "https":
            context = ssl.create_default_context(cafile=str(self.ca))
            connection = http.client.HTTPSConnection(
                address.hostname, address.port, timeout=30, context=context, source_address=(self.source, 0)
            )
        else:
            connection = http.client.HTTPConnection(
                address.hostname, address.port, timeout=30, source_address=(self.source, 0)
            )
        sent = {"Cookie": self.cookie} if self.cookie else {}
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, path, content, sent | (headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.read(), response.headers)
        finally:
            connection.close()

    def auth(self) -> Answer:
        message = {"version": self.version, "tee": self.tee, "extra-params": {}}
        answer = self.request("POST", "/kbs/v0/auth", message)
        if answer.status == 200:
            self.cookie = answer.headers["Set-Cookie"].split(";")[0]
            self.nonce = answer.document["nonce"]
        return answer

    def message(self) -> dict[str, Any]:
        public = jwe.public_members(self.key.public)
        digest = digest_of_json(protocol.runtime_data(self.nonce, public, self.version))
        return protocol.attest_message(self.nonce, public, self.evidence(digest), self.version, None)

    def attest(self, message: object = None) -> Answer:
        return self.request("POST", "/kbs/v0/attest", self.message() if message is None else message)

    def resource(self, path: str = PATH, query: str = "", headers: dict[str, str] | None = None) -> Answer:
        return self.request("GET", f"/kbs/v0/resource/{path}{query}", headers=headers)

    def begin(self) -> Handshake:
        assert self.auth().status == 200
        return self

    def attested(self) -> Handshake:
        answer = self.begin().attest()
        assert answer.status == 200, answer.body
        return self

    def opened(self, answer: Answer) -> bytes:
        assert answer.status == 200, answer.body
        return bytes(jwe.decrypt(answer.document, self.key))


_DIGEST = "sha256:" + "5a" * 32


def unwrapped(uri: str, directory: Path) -> bool:
    """Whether the real client gets the key, and it is the right one."""
    key = json.loads((directory.parent / "kek.jwk").read_text())["k"]
    keyring = create_keyring(b"payload", _DIGEST, [SymmetricKey(bytearray(b64url_decode(key, "k")))])
    provider = provider_from_uri(uri)
    try:
        return bytes(parse_keyring(keyring, _DIGEST).open([provider])) == b"payload"
    finally:
        provider.close()


def copied(directory: Path, target: Path) -> None:
    with sqlite3.connect(directory / "broker.db") as source, sqlite3.connect(target) as copy:
        source.backup(copy)
