"""The reference implementation of ocicrypt, as a program built from its Go module: see ocicrypt_judge/main.go."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.builds import built_program

_SOURCES = Path(__file__).parent / "ocicrypt_judge"
GO = shutil.which("go")

needs_go = pytest.mark.skipif(GO is None, reason="Go is not installed")


@dataclass(frozen=True)
class Judge:
    """The built program."""

    path: Path

    def encrypt(
        self, plain: bytes, recipients: Sequence[str], env: Mapping[str, str] | None = None
    ) -> tuple[dict[str, str], bytes]:
        """Annotations and ciphertext."""
        return _parsed(self.run(plain, "encrypt", *recipients, env=env))

    def decrypt(
        self, annotations: Mapping[str, str], blob: bytes, keys: Sequence[str], env: Mapping[str, str] | None = None
    ) -> bytes:
        return self.run(_document(annotations, blob), "decrypt", *keys, env=env)

    def add(self, annotations: Mapping[str, str], blob: bytes, recipient: str, key: str) -> dict[str, str]:
        return _parsed(self.run(_document(annotations, blob), "add", recipient, key))[0]

    def run(self, content: bytes, *words: str, env: Mapping[str, str] | None = None) -> bytes:
        done = subprocess.run(
            [self.path, *words],
            input=content,
            capture_output=True,
            timeout=60,
            check=False,
            env=dict(os.environ) | dict(env or {}),
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout


def build_judge() -> Judge:
    """Build it, or take the one that was built of the same sources."""
    assert GO is not None
    environment = {"GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly"}
    return Judge(built_program("ocicrypt", _SOURCES, lambda made: [GO, "build", "-o", made, "."], environment))


def _document(annotations: Mapping[str, str], blob: bytes) -> bytes:
    return json.dumps({"annotations": dict(annotations), "blob": base64.b64encode(blob).decode()}).encode()


def _parsed(content: bytes) -> tuple[dict[str, str], bytes]:
    document = json.loads(content)
    return document["annotations"], base64.b64decode(document["blob"])
