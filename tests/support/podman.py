"""podman as a judge: in a mount namespace of its own, without the machine's control groups, network or store."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

#: A namespace without the machine's control groups, which a container engine may not be allowed to write to.
_SCRIPT = """
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || mount -t tmpfs none /sys/fs/cgroup
state=$1
shift
exec podman --root "$state/store" --runroot "$state/run" --storage-driver vfs --cgroup-manager cgroupfs "$@"
"""
#: Limits of this process are not raised: that needs rights over the machine.
_RUN = ("run", "--rm", "--cgroups=disabled", "--network", "none", "--ulimit", "nofile=1024:1024")
_RUN += ("--ulimit", "nproc=1000:1000")


@dataclass(frozen=True)
class Podman:
    """podman with its storage in a directory."""

    state: Path

    def call(self, *words: object, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
        """Any command of it; what came out of it, whatever that is."""
        done = subprocess.run(
            # A pid namespace ends with podman: what it starts to clean up would write into the state that is removed.
            [
                "unshare",
                "-m",
                "--pid",
                "--fork",
                "--mount-proc",
                "sh",
                "-c",
                _SCRIPT,
                "sh",
                str(self.state),
                *map(str, words),
            ],
            input=stdin,
            capture_output=True,
            timeout=200,
            check=False,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """`podman run`."""
        return self.call(*_RUN, *words)


@contextmanager
def running_podman() -> Iterator[Podman]:
    """podman where it runs a plain directory of one program; else the test is skipped with what it said."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    # podman wants a short path.
    with tempfile.TemporaryDirectory(prefix="podman-") as state:
        podman = Podman(Path(state))
        plain = podman.state / "plain"
        (plain / "bin").mkdir(parents=True)
        shutil.copy("/bin/busybox", plain / "bin")
        done = podman.run("--rootfs", plain, "/bin/busybox", "true")
        if done.returncode:
            pytest.skip(f"this machine does not let podman run containers: {done.stderr.strip()[-300:]}")
        yield podman
