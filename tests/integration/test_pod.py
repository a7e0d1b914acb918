"""Two containers in a pod of podman: a sidecar mounts a model and has the key; the other reads it, and has not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import REPOSITORY

pytestmark = [pytest.mark.fuse, pytest.mark.root]

_BLOCK = 1 << 16
_BLOCKS = 256
#: Seconds for any one command, and for any one thing to come about.
_TIMEOUT = 90

#: A namespace of its own for what podman mounts, without the machine's control groups, which a container engine may not
#: be allowed to write to. The directory that the containers share takes part in propagation. It lasts as long as stdin.
_NAMESPACE = """
umount -R /sys/fs/cgroup 2>/dev/null
mount -t cgroup2 none /sys/fs/cgroup || mount -t tmpfs none /sys/fs/cgroup
mount --bind "$1" "$1" && mount --make-private "$1" && mount --make-shared "$1" && echo ready && exec cat
"""

#: No network, no control groups, and no more open files or processes than this machine lets anyone have.
_CONFIGURATION = """
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
infra_image = "localhost/pause:1"
"""

#: The application: reads blocks from the daemon, not from the page cache, through a file that it never closes and
#: through one that it opens anew, until it is told to stop. What is right it knows from digests.
_APPLICATION = """
import hashlib, json, os, random, time
digests = json.load(open("/work/digests"))
block = BLOCK
def read(descriptor, number):
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return hashlib.sha256(os.pread(descriptor, block, number * block)).hexdigest() == digests[number]
kept = os.open("/model/weights", os.O_RDONLY)
said = {"kept": 0, "fresh": 0, "wrong": 0, "kept_errors": 0, "fresh_errors": 0, "longest": 0.0}
source, last = random.Random(1), time.monotonic()
while not os.path.exists("/work/stop"):
    number = source.randrange(len(digests))
    for name in ("kept", "fresh"):
        try:
            descriptor = kept if name == "kept" else os.open("/model/weights", os.O_RDONLY)
            try:
                right = read(descriptor, number)
            finally:
                if name == "fresh":
                    os.close(descriptor)
            said[name if right else "wrong"] += 1
            if name == "fresh":
                now = time.monotonic()
                said["longest"], last = max(said["longest"], now - last), now
        except OSError:
            said[name + "_errors"] += 1
    with open("/work/said.new", "w") as file:
        json.dump(said, file)
    os.rename("/work/said.new", "/work/said")
""".replace("BLOCK", str(_BLOCK))


class Podman:
    """Podman with a state of its own."""

    def __init__(self, state: Path, namespace: int) -> None:
        self._state = state
        self._prefix = ["nsenter", "--target", str(namespace), "--mount", "podman"]
        self._prefix += ["--root", str(state / "store"), "--runroot", str(state / "run"), "--storage-driver", "vfs"]
        (state / "containers.conf").write_text(_CONFIGURATION)

    def run(self, *words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "CONTAINERS_CONF": str(self._state / "containers.conf")}
        done = subprocess.run(
            [*self._prefix, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        assert not check or done.returncode == 0, f"podman {' '.join(map(str, words))}: {done.stderr}"
        return done

    def create(self, name: str, root: Path, options: list[str], *command: str | Path) -> None:
        """A container of the pod, started, whose root filesystem is a directory with places for what is bound."""
        for number, option in enumerate(options):
            if option == "--volume":
                (root / options[number + 1].split(":")[1].lstrip("/")).mkdir(parents=True, exist_ok=True)
        for link in ("bin", "sbin", "lib", "lib64"):
            if Path("/", link).is_symlink():
                (root / link).symlink_to(f"usr/{link}")
        words = ["create", "--pod", "pod", "--name", name, "--read-only", *options, "--rootfs", str(root)]
        self.run(*words, *command)
        self.run("start", name)

    def is_running(self, name: str) -> bool:
        return self.run("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == "true"


def bound(*directories: str) -> list[str]:
    """Options: these directories of the machine, readable in the container at the same place."""
    chosen: list[str] = []
    for path in sorted(set(directories)):
        if not any(Path(path).is_relative_to(other) for other in chosen):
            chosen.append(path)
    return [word for path in chosen for word in ("--volume", f"{path}:{path}:ro")]


@contextmanager
def pod(shared: Path) -> Iterator[Podman]:
    """A pod with nothing in it but what keeps its namespaces; skips where podman cannot run a container at all."""
    if shutil.which("podman") is None:
        pytest.skip("podman is not installed")
    # podman wants a short path.
    with tempfile.TemporaryDirectory(prefix="podman-") as name:
        state = Path(name)
        holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _NAMESPACE, "sh", shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        with holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            if holder.stdout.readline() != b"ready\n":
                pytest.skip("this machine does not give podman a mount namespace of its own")
            podman = Podman(state, holder.pid)
            try:
                pause = state / "pause"
                (pause / "bin").mkdir(parents=True)
                shutil.copy(shutil.which("busybox") or "/bin/busybox", pause / "bin" / "busybox")
                subprocess.run(["tar", "-C", pause, "-cf", state / "pause.tar", "."], check=True)
                command = 'CMD ["/bin/busybox", "sleep", "300"]'
                podman.run("import", "--change", command, state / "pause.tar", "localhost/pause:1")
                podman.run("pod", "create", "--name", "pod", "--network", "none", "--share-parent=false")
                started = podman.run("pod", "start", "pod", check=False)
                if "ermission" in started.stderr or "not permitted" in started.stderr:
                    pytest.skip(f"this machine does not let podman run containers: {started.stderr.strip()[-300:]}")
                assert started.returncode == 0, started.stderr
                yield podman
            finally:
                podman.run("pod", "rm", "--force", "--time", "1", "--all", check=False)
                holder.stdin.close()


class Deployment:
    """A model that is encrypted, and what the two containers see of it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        for name in ("shared", "sealed", "secret", "work", "model", "sidecar", "app"):
            (base / name).mkdir()
        (base / "work").chmod(0o777)
        content = random.Random(6).randbytes(_BLOCK * _BLOCKS)
        (base / "model" / "weights").write_bytes(content)
        digests = [sha256(content[at : at + _BLOCK]).hexdigest() for at in range(0, len(content), _BLOCK)]
        (base / "work" / "digests").write_text(json.dumps(digests))
        tools = Path(sys.executable).parent
        key = base / "secret" / "a.jwk"
        for words in (["keygen", "-o", key], ["encrypt", base / "model", self.sealed, "-r", f"{key}.pub"]):
            subprocess.run([tools / "imagetool", *words], check=True, capture_output=True, timeout=_TIMEOUT)
        shutil.rmtree(base / "model")

    @property
    def sealed(self) -> str:
        return f"oci:{self.base / 'sealed' / 'store'}:v1"

    def start_sidecar(self, podman: Podman) -> None:
        options = ["--privileged", "--device", "/dev/fuse", "--tmpfs", "/run", "--tmpfs", "/tmp"]  # noqa: S108 - its own
        options += ["--env", "ENCFS_RUNTIME_DIR=/run/encfs", "--stop-signal", "TERM"]
        options += bound("/usr", str(REPOSITORY), sys.prefix, sys.base_prefix, str(self.base / "sealed"))
        options += [
            "--volume",
            f"{self.base / 'secret'}:/secret:ro",
            "--volume",
            f"{self.base / 'shared'}:/model:rshared",
        ]
        encfs = Path(sys.executable).parent / "encfs"
        command = [encfs, "mount", self.sealed, "/model", "--key=/secret/a.jwk", "--allow-unsigned", "--allow-other"]
        podman.create("sidecar", self.base / "sidecar", options, *command, "--supervise", "--foreground")

    def start_app(self, podman: Podman) -> None:
        """Another user, without privilege; with a Python, but nothing of encfs, and no key."""
        options = ["--user", "65534:65534", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
        options += bound("/usr", sys.base_prefix, str(self.base / "sealed"))
        options += ["--volume", f"{self.base / 'work'}:/work", "--volume", f"{self.base / 'shared'}:/model:ro,rslave"]
        python = os.path.realpath(sys.executable)
        podman.create("app", self.base / "app", options, python, "-I", "-c", _APPLICATION)

    def said(self) -> dict[str, Any]:
        path = self.base / "work" / "said"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"kept": 0, "fresh": 0}
        return found


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def sidecar(podman: Podman, *words: str) -> subprocess.CompletedProcess[str]:
    return podman.run("exec", "sidecar", Path(sys.executable).parent / "encfs", *words, check=False)


def test_the_app_reads_what_only_the_sidecar_can_decrypt_and_outlives_its_daemon(tmp_path: Path) -> None:
    deployment = Deployment(tmp_path)
    with pod(tmp_path / "shared") as podman:
        deployment.start_sidecar(podman)
        # As the startup probe of deploy/kubernetes/sidecar.yaml.
        wait_for(
            lambda: sidecar(podman, "status", "--check").returncode == 0, lambda: podman.run("logs", "sidecar").stderr
        )
        assert list((tmp_path / "shared").iterdir()) == []  # outside the pod there is nothing to be seen
        deployment.start_app(podman)
        wait_for(lambda: deployment.said()["fresh"] >= 5, lambda: podman.run("logs", "app").stderr)
        podman.run("exec", "app", "sh", "-c", "test -r /model/weights && test ! -e /secret")
        process = podman.run("inspect", "--format", "{{.State.Pid}}", "app").stdout

        [status] = json.loads(sidecar(podman, "status", "--json").stdout)["mounts"]
        podman.run("exec", "sidecar", "sh", "-c", f"kill -KILL {status['pid']}")
        before = deployment.said()
        wait_for(lambda: deployment.said()["kept"] >= before["kept"] + 20, deployment.said)
        [later] = json.loads(sidecar(podman, "status", "--json").stdout)["mounts"]
        assert (later["restarts"], later["reason"], later["state"]) == (1, "killed by SIGKILL", "serving")
        assert later["pid"] != status["pid"]

        assert podman.is_running("app")
        assert podman.run("inspect", "--format", "{{.State.Pid}}", "app").stdout == process
        (tmp_path / "work" / "stop").touch()
        assert podman.run("wait", "app").stdout.strip() == "0"
        said = deployment.said()
        assert (said["wrong"], said["kept_errors"], said["fresh_errors"]) == (0, 0, 0)
        # About a second, most of which is starting Python; a machine that has more to do than it can takes longer.
        assert said["longest"] < 30.0, said
        podman.run("stop", "--time", "60", "sidecar")
        assert podman.run("inspect", "--format", "{{.State.ExitCode}}", "sidecar").stdout.strip() == "0"
