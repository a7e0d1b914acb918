"""Commands as a user calls them: in this process where that is the same, as starting Python takes most of the time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

import encfs.cli
import imagetool.cli
from encfs.console import commandline
from encfs.errors import EncfsError
from encfs.mount.runtime import ENVIRONMENT_VARIABLE

APPS = {"encfs": encfs.cli.app, "imagetool": imagetool.cli.app}


@dataclass(frozen=True, slots=True)
class Shell:
    """A directory that commands run in."""

    path: Path

    def run(self, *words: str, input: bytes | None = None) -> subprocess.CompletedProcess[str]:  # noqa: A002
        if words[1] in ("mount", "umount", "status") or input is not None:
            return self._run_process(*words, input=input)
        # The same without starting Python again, which takes most of the time.
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        with contextlib.chdir(self.path), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as caught:
                commandline.main(APPS[words[0]], words[0], words[1:])
            out.flush()
            err.flush()
        texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
        return subprocess.CompletedProcess(words, cast("int", caught.value.code), *texts)

    def _run_process(self, *words: str, input: bytes | None = None) -> subprocess.CompletedProcess[str]:  # noqa: A002
        program = ["-c", f"from {words[0]}.cli import main; main()"]
        done = subprocess.run(
            [sys.executable, *program, *words[1:]],
            cwd=self.path,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            check=False,
            timeout=120,
            env={**os.environ, ENVIRONMENT_VARIABLE: str(self.path / "run")},
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def ok(self, *words: str, input: bytes | None = None) -> str:  # noqa: A002
        done = self.run(*words, input=input)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, *words: str) -> dict[str, object]:
        document = json.loads(self.ok(*words, "--json"))
        assert isinstance(document, dict)
        return document

    def refused(self, kind: type[EncfsError], *words: str) -> str:
        """The one line of a failure that must be of this kind, both for people and as JSON."""
        done = self.run(*words, "--json")
        lines = [line for line in done.stderr.splitlines() if ": warning: " not in line]
        assert done.returncode == kind.exit_code, done.stderr
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith(f"{words[0]}: error: ")
        document = json.loads(done.stdout)
        assert document["exit_code"] == kind.exit_code
        error = document["error"]
        assert error["type"] == kind.__name__
        hint = f"; {error['hint']}" if error["hint"] else ""
        assert lines[0] == f"{words[0]}: error: {error['message']}{hint}"
        return lines[0]
