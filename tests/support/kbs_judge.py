"""The key broker protocol by the types of Trustee's own crate, as a program built of crates: kbs_judge/src/main.rs.

Its server's and its client's side are put behind and in front of HTTP here.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.builds import built_program
from tests.support.kbs_server import KbsServer, Reply, encoded, error

_SOURCES = Path(__file__).parent / "kbs_judge"
CARGO = shutil.which("cargo")

needs_cargo = pytest.mark.skipif(CARGO is None, reason="Rust's cargo is not installed")

# cargo has no option for where the program itself goes.
_BUILD = """
import os, shutil, subprocess, sys
cargo, made = sys.argv[1:]
subprocess.run([cargo, "build", "--locked", "--quiet", "--target-dir", made + ".d"], check=True)
os.rename(made + ".d/debug/kbs-judge", made)
shutil.rmtree(made + ".d")
"""


@dataclass(frozen=True)
class Judge:
    """The built program."""

    path: Path

    def run(self, word: str, content: bytes = b"") -> bytes:
        """What it answers. Fails where it refuses."""
        done = self._run(word, content)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def refuses(self, word: str, content: bytes) -> bool:
        return self._run(word, content).returncode != 0

    def parsed(self, word: str, content: bytes) -> dict[str, Any]:
        """A message as the crate's types hold it."""
        found: dict[str, Any] = json.loads(self.run(word, content))
        return found

    def seal(self, content: bytes, key: object) -> bytes:
        return self.run("seal", encoded({"tee-pubkey": key, "content": base64.b64encode(content).decode()}))

    def keygen(self, curve: str = "P-256") -> dict[str, Any]:
        """A client's key pair: `crv`, `private`, and `tee-pubkey` for its messages."""
        return self.parsed("keygen", encoded({"crv": curve}))

    def open(self, response: object, pair: dict[str, Any]) -> bytes:
        return self.run("open", encoded(pair | {"response": response}))

    def _run(self, word: str, content: bytes) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([self.path, word], input=content, capture_output=True, timeout=60, check=False)


def build_judge() -> Judge:
    """Build it, or take the one that was built of the same sources."""
    assert CARGO is not None
    return Judge(built_program("kbs", _SOURCES, lambda made: [sys.executable, "-c", _BUILD, CARGO, str(made)], {}))


class JudgedServer(KbsServer):
    """A server every message of which goes through the judge."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def _auth(self, request: dict[str, Any]) -> Reply:
        # Written as the crate does: nothing that it does not know gets through.
        status, headers, body = super()._auth(self.judge.parsed("request", encoded(request)))
        return status, headers, self.judge.run("challenge" if status == 200 else "error", body)

    def _attest(self, session: dict[str, Any] | None, request: dict[str, Any]) -> Reply:
        assert session is not None
        message = self.judge.run("attestation", encoded(request))
        known = json.loads(message)
        assert known == request, "the crate knows every member, and keeps it"
        evidence = known["tee-evidence"]["primary_evidence"]
        if base64.b64decode(evidence["report_data"]).hex() != self.judge.run("report-data", message).decode():
            return error(401, "AttestationFailed", "the report data is not the expected")
        session["key"] = known["runtime-data"]["tee-pubkey"]
        return 200, {}, encoded({"token": "e30.e30.e30"})

    def _resource(self, session: dict[str, Any] | None, path: str) -> Reply:
        if session is None or session["key"] is None or path not in self.resources:
            return error(404, "ResourceNotFound", "no such resource")
        return 200, {}, self.judge.seal(self.resources[path], session["key"])
