"""A real TPM 2.0 for tests: Debian's swtpm on sockets of its own, and Debian's tpm2-tools as the judge.

There is no resource manager in front of it, so tools leave objects behind: `SoftwareTpm.tool` flushes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import wait_until

SWTPM = shutil.which("swtpm")


def is_listening(path: Path) -> bool:
    """Whether somebody accepts connections at a socket: its file is there a moment before."""
    accepting = 0x10000  # __SO_ACCEPTCON of the kernel's net/unix
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return any(len(row) == 8 and row[7] == str(path) and int(row[3], 16) & accepting for row in rows)


class SoftwareTpm:
    """One software TPM. `state` survives `stop` and `start`, as a TPM survives a reboot; its PCRs do not."""

    def __init__(self) -> None:
        # Not pytest's directory: the path of a socket has at most 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="encfs-tpm-"))
        self._process: subprocess.Popen[bytes] | None = None
        (self._directory / "state").mkdir()

    @property
    def tcti(self) -> str:
        return f"swtpm:path={self._directory / 'tpm'}"

    def start(self) -> None:
        assert SWTPM is not None, "swtpm is not installed"
        sockets = [self._directory / name for name in ("tpm", "tpm.ctrl")]
        self._process = subprocess.Popen(
            [
                *(SWTPM, "socket", "--tpm2", "--tpmstate", f"dir={self._directory / 'state'}"),
                *("--server", f"type=unixio,path={sockets[0]}", "--ctrl", f"type=unixio,path={sockets[1]}"),
                *("--flags", "not-need-init,startup-clear"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        process = self._process

        def listens() -> bool:
            assert process.poll() is None, "swtpm ended"
            return all(map(is_listening, sockets))

        wait_until(listens)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(60)
            self._process = None
        for name in ("tpm", "tpm.ctrl"):
            (self._directory / name).unlink(missing_ok=True)

    def restart(self) -> None:
        """What a reboot is for a TPM."""
        self.stop()
        self.start()

    def replace(self) -> None:
        """Another TPM in the place of this one."""
        self.stop()
        shutil.rmtree(self._directory / "state")
        (self._directory / "state").mkdir()
        self.start()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._directory)

    def tool(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        """Run one of tpm2-tools, without its prefix `tpm2_`, in an empty directory of this TPM's."""
        environment = os.environ | {"TPM2TOOLS_TCTI": self.tcti}
        done = subprocess.run(
            [f"tpm2_{words[0]}", *words[1:]],
            env=environment,
            cwd=self._directory,
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0 or not check, done.stderr.decode(errors="replace")
        for kind in ("-t", "-l", "-s"):
            subprocess.run(["tpm2_flushcontext", kind], env=environment, capture_output=True, check=False, timeout=120)
        return done

    def extend(self, pcr: int, value: str = "11" * 32) -> None:
        self.tool("pcrextend", f"{pcr}:sha256={value}")

    def transient(self) -> str:
        """The handles of objects and sessions that are in it now: there should be none."""
        return "".join(
            self.tool("getcap", kind).stdout.decode().strip()
            for kind in ("handles-transient", "handles-loaded-session", "handles-saved-session")
        )


def software_tpm() -> Iterator[SoftwareTpm]:
    one = SoftwareTpm()
    try:
        one.start()
        yield one
    finally:
        one.remove()


@pytest.fixture
def tpm(monkeypatch: pytest.MonkeyPatch) -> Iterator[SoftwareTpm]:
    """A TPM fresh from the factory, which is the machine's during the test."""
    for one in software_tpm():
        monkeypatch.setenv("TPM2TOOLS_TCTI", one.tcti)
        yield one
