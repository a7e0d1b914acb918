"""systemd as the first process of namespaces of its own, over a copy in memory of this machine's root filesystem.

What is installed here is there as well, and what is written there is seen nowhere else. Units of this machine are not
started: only those that a test puts in `/etc/systemd/system`. Not here: control groups' limits, which need not exist.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import REPOSITORY

_SYSTEMD = Path("/usr/lib/systemd/systemd")
#: Seconds to boot, and for one command.
_TIMEOUT = 90

#: Arguments: a directory for the root filesystem, one to be seen there as /test, and those that a copy of this
#: machine's root filesystem lacks. The first process has its own namespaces already.
_BOOT = r"""
set -e
root=$1 shared=$2; shift 2
mount --make-rprivate /
mount -t tmpfs none "$root"
mkdir "$root/upper" "$root/work" "$root/root"
mount -t overlay -o "lowerdir=/,upperdir=$root/upper,workdir=$root/work" overlay "$root/root"
cd "$root/root"
rm -rf etc/systemd/system usr/lib/systemd/system/*.wants etc/fstab
mkdir -p etc/systemd/system test mnt etc/encfs
mount -t tmpfs none run; mount -t tmpfs none tmp
for path; do mkdir -p ".$path" && mount --rbind "$path" ".$path"; done
mount --bind "$shared" test
mount -t proc proc proc
mount --rbind /sys sys
umount -R sys/fs/cgroup
mount -t cgroup2 none sys/fs/cgroup
mount -t tmpfs none dev; mkdir dev/shm dev/pts
for name in null zero full random urandom tty fuse; do touch dev/$name; mount --bind /dev/$name dev/$name; done
ln -s /proc/self/fd dev/fd
printf '%s\n' '[Unit]' 'Requires=basic.target systemd-journald.service' After=basic.target AllowIsolate=yes \
    > etc/systemd/system/default.target
mkdir old
pivot_root . old
umount -l old
exec env -i container=encfs-test PATH=/usr/sbin:/usr/bin:/sbin:/bin "$0" --system --log-target=null --show-status=0
"""


class Machine:
    """A running systemd."""

    def __init__(self, first: int, shared: Path) -> None:
        #: The number of its first process.
        self.first = first
        self.shared = shared

    def run(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A command in there."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.first), "--all", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done

    def shell(self, script: str) -> str:
        return self.run("sh", "-ec", script).stdout

    def property(self, unit: str, name: str) -> str:
        return self.run("systemctl", "show", "--property", name, "--value", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output", "cat", "--unit", unit).stdout


@contextmanager
def booted() -> Iterator[Machine]:
    """One machine until the end of the context; skips where systemd, or what it needs of the kernel, is not there."""
    if not _SYSTEMD.exists():
        pytest.skip("systemd is not installed")
    with tempfile.TemporaryDirectory(prefix="encfs-") as name:
        root, shared = Path(name, "root"), Path(name, "shared")
        root.mkdir()
        shared.mkdir()
        places = [str(path) for path in (REPOSITORY, sys.prefix, sys.base_prefix) if not _is_copied(Path(path))]
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"]
        boot = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", _BOOT, _SYSTEMD, root, shared, *places],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield Machine(_wait_for_boot(boot), shared)
        finally:
            boot.kill()  # and with it the first process, and with that one everything
            boot.communicate()


def _is_copied(path: Path) -> bool:
    """Whether the copy of the root filesystem has it: not from other filesystems, nor where it gets empty ones."""
    hidden = any(path.is_relative_to(one) for one in ("/tmp", "/run", "/dev"))  # noqa: S108 - not to be written
    return path.stat().st_dev == Path("/").stat().st_dev and not hidden


def _wait_for_boot(boot: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + _TIMEOUT
    children = Path(f"/proc/{boot.pid}/task/{boot.pid}/children")
    while time.monotonic() < deadline:
        if boot.poll() is not None:
            said = boot.communicate()[1].strip()[-300:]
            pytest.skip(f"this machine does not let systemd run in namespaces of its own: {said}")
        first = children.read_text().split()
        if first:
            words = ["nsenter", "--target", first[0], "--all", "systemctl", "is-system-running", "--wait"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
            if done.stdout.strip() in {"running", "degraded"}:
                return int(first[0])
        time.sleep(0.1)
    raise AssertionError("systemd does not come up")
