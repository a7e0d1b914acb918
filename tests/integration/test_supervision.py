"""Mounts behind a supervisor: daemons are killed under readers who must not notice, or see a clean error."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import REPOSITORY, detach_all, is_mounted, wait_for_end
from tests.support.waiting import LONG, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

_SIZE = 24 << 20
#: Where control groups limit memory one by one (cgroup v1).
_MEMORY = Path("/sys/fs/cgroup/memory")


class Mounted:
    """An artifact on disk, and the command that mounts it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.place = base / "mount"
        self.place.mkdir()
        self.working_directory = REPOSITORY
        self.environment = {**os.environ, "ENCFS_RUNTIME_DIR": str(base / "run")}
        model = base / "model"
        model.mkdir()
        self.content = random.Random(7).randbytes(_SIZE)
        (model / "weights").write_bytes(self.content)
        (model / "hello").write_text("hello\n")
        self.imagetool("keygen", "-o", base / "a.jwk")
        self.imagetool("encrypt", model, self.reference, "-r", base / "a.jwk.pub")

    @property
    def reference(self) -> str:
        return f"oci:{self.base / 'store'}:v1"

    @property
    def weights(self) -> Path:
        return self.place / "weights"

    def imagetool(self, *words: str | Path) -> None:
        subprocess.run(
            [Path(sys.executable).parent / "imagetool", *words], check=True, capture_output=True, timeout=120
        )

    def encfs(self, *words: str | Path, code: int = 0, **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.supervised", *words, "--json"],
            cwd=self.working_directory,
            env={**self.environment, "PYTHONPATH": str(REPOSITORY), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def mount(self, *words: str | Path, code: int = 0, **environment: str) -> dict[str, Any]:
        options = ("--supervise", "--allow-unsigned", *words)
        if "-k" not in words:
            options += ("-k", self.base / "a.jwk")
        return self.encfs("mount", self.reference, self.place, *options, code=code, **environment)

    def status(self) -> dict[str, Any]:
        found: list[dict[str, Any]] = self.encfs("status")["mounts"]
        return next(one for one in found if one["mountpoint"] == str(self.place))

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def holds() -> bool:
            found[:] = [self.status()]
            return condition(found[0])

        wait_until(holds, lambda: found)
        return found[0]

    def read(self, descriptor: int, offset: int, size: int) -> bool:
        """Whether a read from the daemon, not from the page cache, is what was encrypted."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(descriptor, size, offset) == self.content[offset : offset + size]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounted]:
    mounted = Mounted(tmp_path)
    yield mounted
    supervisors = [one["supervisor"] for one in mounted.encfs("status")["mounts"] if one["supervisor"]]
    detach_all(mounted.place)
    for pid in supervisors:
        assert wait_for_end(pid)


def test_readers_do_not_notice_that_the_daemon_is_killed(mounted: Mounted) -> None:
    mounted.mount()
    wrong: list[int] = []
    errors: list[OSError] = []
    longest = [0.0] * 3
    done = threading.Event()

    def read(number: int) -> None:
        source = random.Random(number)
        descriptor = os.open(mounted.weights, os.O_RDONLY)
        while not done.is_set():
            offset = source.randrange(_SIZE - 100_000)
            started = time.monotonic()
            try:
                if not mounted.read(descriptor, offset, 100_000):
                    wrong.append(offset)
            except OSError as error:
                errors.append(error)
            longest[number] = max(longest[number], time.monotonic() - started)
            if number:  # the first one keeps its file open over all daemons
                os.close(descriptor)
                descriptor = os.open(mounted.weights, os.O_RDONLY)
        os.close(descriptor)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for restarts in range(2):
            status = mounted.wait_for(
                lambda status, n=restarts: status["state"] == "serving" and status["restarts"] == n
            )
            os.kill(status["pid"], signal.SIGKILL)
        status = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 2)
        time.sleep(0.3)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert errors == []
    assert 0 < max(longest) < LONG  # about 1 s where the machine has nothing else to do
    assert status["reason"] == "killed by SIGKILL"
    assert "was lost: killed by SIGKILL" in Path(status["log_file"]).read_text()


def test_a_kernel_that_cannot_resend_fails_requests_under_way_and_goes_on(mounted: Mounted) -> None:
    status = mounted.mount(ENCFS_TEST_NO_RESEND="1")
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    os.kill(status["pid"], signal.SIGSTOP)
    failures: list[OSError] = []

    def read() -> None:
        try:
            os.pread(descriptor, 100_000, 8 << 20)
        except OSError as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    time.sleep(0.3)
    os.kill(status["pid"], signal.SIGKILL)
    thread.join(LONG)
    assert not thread.is_alive()
    mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    assert mounted.read(descriptor, 8 << 20, 100_000)
    os.close(descriptor)
    # The daemon was stopped before it took the request, or after: it was answered by the next one, or failed.
    assert [failure.errno for failure in failures] in ([], [errno.ECONNABORTED])


def test_without_a_daemon_reads_fail_in_bounded_time_and_recover(mounted: Mounted) -> None:
    status = mounted.mount(ENCFS_TEST_PATIENCE="1")
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    key = mounted.base / "a.jwk"
    key.rename(mounted.base / "away")
    os.kill(status["pid"], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        mounted.read(descriptor, 4 << 20, 4096)
    assert time.monotonic() - started < LONG
    mounted.wait_for(lambda status: status["state"] == "failing" and "a.jwk" in status["reason"])
    (mounted.base / "away").rename(key)
    mounted.wait_for(lambda status: status["state"] == "serving")
    assert mounted.read(descriptor, 4 << 20, 4096)
    os.close(descriptor)


def test_a_tag_that_moves_does_not_change_what_is_mounted(mounted: Mounted) -> None:
    status = mounted.mount(ENCFS_TEST_PATIENCE="1")
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    (mounted.base / "model" / "weights").write_bytes(bytes(1000))
    mounted.imagetool("encrypt", mounted.base / "model", mounted.reference, "-r", mounted.base / "a.jwk.pub")
    os.kill(status["pid"], signal.SIGKILL)
    later = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    for name in ("content_digest", "manifest_digest"):
        assert later[name] == status[name] != ""
    assert mounted.read(descriptor, 4 << 20, 4096)
    assert mounted.weights.stat().st_size == _SIZE
    assert "superseded_by sha256:" in Path(later["log_file"]).read_text()

    # Once it is removed, nothing else is served in its place.
    blobs = mounted.base / "store" / "blobs" / "sha256"
    (blobs / status["manifest_digest"].removeprefix("sha256:")).unlink()
    os.kill(later["pid"], signal.SIGKILL)
    mounted.wait_for(lambda status: status["state"] == "failing" and "is gone" in status["reason"])
    with pytest.raises(OSError, match="Input/output error"):
        mounted.read(descriptor, 0, 4096)
    os.close(descriptor)


def test_a_daemon_without_memory_is_replaced_and_the_log_says_why(mounted: Mounted) -> None:
    status = mounted.mount(**_vmstat(mounted, 0))
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    with _without_memory(status["pid"], lambda: _vmstat(mounted, 1)):
        later = mounted.wait_for(
            lambda status: (
                (status["state"] == "serving" and status["restarts"] == 1) or _have_it_allocate(mounted, descriptor)
            )
        )
    os.close(descriptor)
    assert later["reason"] == "killed by SIGKILL, and the kernel has killed for lack of memory meanwhile"
    assert later["reason"] in Path(later["log_file"]).read_text()


def _have_it_allocate(mounted: Mounted, descriptor: int) -> bool:
    """Have a daemon read from the disk, for which it begins threads; what is at hand it reads into what it has."""
    for blob in (mounted.base / "store" / "blobs" / "sha256").iterdir():
        with blob.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda at: mounted.read(descriptor, at, 1 << 19), range(0, _SIZE, 1 << 20)))
    return False


def _vmstat(mounted: Mounted, kills: int) -> dict[str, str]:
    """The kernel's counters as the supervisor sees them, where the kernel is not the one that is going to kill."""
    if _MEMORY.is_dir():
        return {}
    (mounted.base / "vmstat").write_text(f"nr_free_pages 1\noom_kill {kills}\n")
    return {"ENCFS_TEST_VMSTAT": str(mounted.base / "vmstat")}


@contextmanager
def _without_memory(pid: int, count: Callable[[], object]) -> Iterator[None]:
    """Let the kernel kill a process for want of memory; where that cannot be limited for one, do the same by hand."""
    if not _MEMORY.is_dir():
        count()
        os.kill(pid, signal.SIGKILL)
        yield
        return
    group = _MEMORY / f"encfs-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(1 << 20))
        (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        wait_for_end(pid, 20)
        group.rmdir()


def test_hangup_replaces_the_daemon(mounted: Mounted) -> None:
    status = mounted.mount()
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    os.kill(status["supervisor"], signal.SIGHUP)
    later = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    assert (later["reason"], later["pid"] != status["pid"]) == ("replaced", True)
    assert mounted.read(descriptor, 1 << 20, 4096)
    os.close(descriptor)


@pytest.mark.parametrize("how", ["other session", "no key", "other content is gone"])
def test_a_successor_that_cannot_serve_does_not_replace_anything(mounted: Mounted, how: str) -> None:
    """The daemon is not ended before its successor is prepared: a failed upgrade costs nothing."""
    status = mounted.mount(**({"ENCFS_TEST_OTHER_SESSION": "1"} if how == "other session" else {}))
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    if how == "no key":
        (mounted.base / "a.jwk").rename(mounted.base / "away")
    elif how == "other content is gone":
        (mounted.base / "store" / "index.json").rename(mounted.base / "away")
    os.kill(status["supervisor"], signal.SIGHUP)
    later = mounted.wait_for(lambda status: status["reason"] != "")
    expected = {
        "other session": "not replaced: this version negotiates another FUSE session",
        "no key": "not replaced: ",
        "other content is gone": "not replaced: ",
    }[how]
    assert later["reason"].startswith(expected)
    assert (later["pid"], later["state"], later["restarts"]) == (status["pid"], "serving", 0)
    assert later["reason"] in Path(status["log_file"]).read_text()
    assert mounted.read(descriptor, 1 << 20, 4096)
    if how != "other session":
        # What was lacking is there again, and the next attempt succeeds.
        (mounted.base / "away").rename(mounted.base / ("a.jwk" if how == "no key" else "store/index.json"))
        os.kill(status["supervisor"], signal.SIGHUP)
        later = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
        assert (later["reason"], later["pid"] != status["pid"]) == ("replaced", True)
        assert mounted.read(descriptor, 1 << 20, 4096)
    os.close(descriptor)


def test_a_daemon_that_dies_while_its_successor_prepares(mounted: Mounted) -> None:
    status = mounted.mount()
    descriptor = os.open(mounted.weights, os.O_RDONLY)
    os.kill(status["supervisor"], signal.SIGHUP)
    wait_until(lambda: len(_children(status["supervisor"])) == 2)
    os.kill(status["pid"], signal.SIGKILL)
    assert mounted.read(descriptor, 1 << 20, 4096)
    later = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    assert later["reason"] in {"killed by SIGKILL", "replaced"}
    os.close(descriptor)


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_port_is_handed_on_to_the_successor(mounted: Mounted) -> None:
    place = mounted.base / "probes.sock"
    status = mounted.mount("--listen", f"unix:{place}")
    os.kill(status["supervisor"], signal.SIGHUP)
    mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(place))
        probe.sendall(b"GET /readyz HTTP/1.1\r\n\r\n")
        assert b" 200 " in probe.recv(4096)


def test_a_daemon_that_cannot_be_started_is_started_later(mounted: Mounted) -> None:
    status = mounted.mount()
    limits = resource.prlimit(status["supervisor"], resource.RLIMIT_NOFILE)
    descriptors = sorted(map(int, os.listdir(f"/proc/{status['supervisor']}/fd")))
    free = next(number for number in range(len(descriptors) + 1) if number not in descriptors)
    resource.prlimit(status["supervisor"], resource.RLIMIT_NOFILE, (max(free, 8), limits[1]))
    os.kill(status["pid"], signal.SIGKILL)
    assert wait_for_end(status["pid"])
    log = Path(status["log_file"])
    wait_until(lambda: "Too many open files" in log.read_text())
    resource.prlimit(status["supervisor"], resource.RLIMIT_NOFILE, limits)
    later = mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    assert later["pid"] != status["pid"]
    assert (mounted.place / "hello").read_text() == "hello\n"


def test_the_directory_that_the_command_was_given_in_may_go(mounted: Mounted) -> None:
    mounted.working_directory = mounted.base / "work"
    mounted.working_directory.mkdir()
    status = mounted.mount()
    mounted.working_directory.rmdir()
    mounted.working_directory = REPOSITORY
    os.kill(status["pid"], signal.SIGKILL)
    mounted.wait_for(lambda status: status["state"] == "serving" and status["restarts"] == 1)
    assert (mounted.place / "hello").read_text() == "hello\n"


@pytest.mark.parametrize("how", ["umount", "SIGTERM", "force"])
def test_the_end_leaves_nothing(mounted: Mounted, how: str) -> None:
    status = mounted.mount()
    assert (mounted.place / "hello").read_text() == "hello\n"
    if how == "SIGTERM":
        os.kill(status["supervisor"], signal.SIGTERM)
    else:
        mounted.encfs("umount", mounted.place, *(["--force"] if how == "force" else []))
    assert wait_for_end(status["supervisor"])
    assert wait_for_end(status["pid"])
    assert not is_mounted(mounted.place)
    assert list((mounted.base / "run").iterdir()) == []


def test_a_daemon_whose_supervisor_is_gone_serves_on(mounted: Mounted) -> None:
    status = mounted.mount()
    os.kill(status["supervisor"], signal.SIGKILL)
    assert wait_for_end(status["supervisor"])
    later = mounted.wait_for(lambda later: later["state"] == "serving" and later["pid"] == status["pid"])
    assert (mounted.place / "hello").read_text() == "hello\n"
    mounted.encfs("umount", mounted.place)
    assert wait_for_end(later["pid"])


def test_what_the_first_daemon_finds_is_what_the_command_says(mounted: Mounted) -> None:
    mounted.imagetool("keygen", "-o", mounted.base / "eve.jwk")
    answer = mounted.mount("-k", mounted.base / "eve.jwk", code=22)
    assert answer["error"]["type"] == "WrongKeyError"
    assert not is_mounted(mounted.place)


@pytest.mark.parametrize("key", ["env:KEY", "passphrase:", "passphrase:fd=3"])
def test_keys_that_can_be_had_once_only_are_refused(mounted: Mounted, key: str) -> None:
    answer = mounted.mount("-k", key, code=2)
    assert "cannot get the key" in answer["error"]["message"]


def test_a_daemon_that_can_make_no_socket_of_its_own_serves_on(mounted: Mounted) -> None:
    status = mounted.mount()
    run, aside = mounted.base / "run", mounted.base / "aside"
    with open(status["log_file"]) as log:
        run.rename(aside)
        run.touch()
        os.kill(status["supervisor"], signal.SIGKILL)
        wait_until(lambda: "nobody can ask for it" in log.read())
        descriptor = os.open(mounted.weights, os.O_RDONLY)
        assert mounted.read(descriptor, 4 << 20, 4096)
        os.close(descriptor)
    run.unlink()
    aside.rename(run)
    os.kill(status["pid"], signal.SIGTERM)
    assert wait_for_end(status["pid"])
