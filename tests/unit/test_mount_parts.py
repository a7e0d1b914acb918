"""Parts of the mount that need no mount: mountinfo, limits of the log, choosing whether to poll, the pipe back."""

from __future__ import annotations

import base64
import logging
import os
import struct
import subprocess
import sys
from pathlib import Path

import pyfuse3
import pytest

from encfs.errors import FormatError, IntegrityError, MountError, StorageError
from encfs.mount import MountOptions, polling
from encfs.mount.failures import FailureLog
from encfs.mount.fusedevice import _mount_as_user
from encfs.mount.keeper import Keeper
from encfs.mount.logs import logging_to
from encfs.mount.mountpoint import _unmount_as_user, absolute, parse_mountinfo
from encfs.mount.runtime import ENVIRONMENT_VARIABLE, existing_runtime_directory, runtime_directory
from tests.support.mounts import wait_for_end

# mountinfo: the lines are of a real machine.


def test_mountinfo_with_escapes_and_optional_fields() -> None:
    text = (
        "36 35 98:0 / /mnt rw,noatime shared:1 master:2 - ext4 /dev/root rw,errors=continue\n"
        "37 35 0:39 / /mnt/a\\040b\\011c\\012d\\134e\\043f ro,nosuid - fuse.encfs encfs rw,user_id=0\n"
        "38 35 0:40 / /mnt/größe\udcff ro - fuse.encfs encfs rw\n"
        "39 35 0:41 / /mnt/- ro - tmpfs - rw\n"
        "40 35 0:42 / /mnt/a\f\x1c\x85\u2028b\r ro - fuse.encfs encfs rw\n"
    )
    mounts = parse_mountinfo(text)
    assert [mount.mountpoint for mount in mounts] == [
        "/mnt",
        "/mnt/a b\tc\nd\\e#f",
        "/mnt/größe\udcff",
        "/mnt/-",
        "/mnt/a\f\x1c\x85\u2028b\r",
    ]
    assert (mounts[0].filesystem_type, mounts[0].source, mounts[0].device) == ("ext4", "/dev/root", "98:0")
    assert (mounts[1].filesystem_type, mounts[1].source, mounts[1].options) == ("fuse.encfs", "encfs", "ro,nosuid")
    assert (mounts[3].filesystem_type, mounts[3].source) == ("tmpfs", "-")


@pytest.mark.parametrize(
    "line", ["", "x", "1 2 3 4 5 6", "a b c d e f - g h", "1 2 0:1 / /mnt - ext4", "1 2 0:1 / - ext4 x"]
)
def test_lines_that_do_not_fit_are_left_out(line: str) -> None:
    assert parse_mountinfo(line) == []


@pytest.mark.parametrize(
    ("script", "mode", "message"),
    [("#!/bin/sh\n", 0o755, "gave no descriptor"), ("#!/bin/sh\n", 0o644, "Permission denied"), ("x", 0o755, "format")],
)
def test_a_fusermount3_that_does_not_do_its_work(
    script: str, mode: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fusermount3").write_text(script)
    (tmp_path / "fusermount3").chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MountError, match=message):
        _mount_as_user("/nowhere", MountOptions())
    if message != "gave no descriptor":
        with pytest.raises(MountError, match=message):
            _unmount_as_user("/nowhere", lazy=False)


def test_absolute_follows_links_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to-inner").symlink_to("link/inner")
    assert absolute(tmp_path / "link" / "inner" / ".." / "inner" / "") == str(tmp_path / "real" / "inner")
    assert absolute(tmp_path / "to-inner") == str(tmp_path / "real" / "inner")
    assert absolute(tmp_path / "link" / "missing") == str(tmp_path / "real" / "missing")
    assert absolute("/") == "/"


def test_kernel_options() -> None:
    assert MountOptions().kernel_options() == {
        "ro",
        "nosuid",
        "nodev",
        "default_permissions",
        "fsname=encfs",
        "subtype=encfs",
    }
    everything = MountOptions(allow_other=True, suid=True, dev=True, default_permissions=False).kernel_options()
    assert everything == {"ro", "suid", "dev", "allow_other", "fsname=encfs", "subtype=encfs"}


# The log of failures


class Clock:
    """Seconds, moved by the test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_same_failure_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    failures = FailureLog(clock)
    for _ in range(100):
        failures.record(IntegrityError("frame 7 is altered"))
    assert caplog.messages == ["IntegrityError: frame 7 is altered"]
    assert failures.count == 100
    clock.now += 61
    failures.record(IntegrityError("frame 7 is altered"))
    assert caplog.messages[1:] == ["IntegrityError: frame 7 is altered (99 similar left out)"]


def test_many_different_failures_are_bounded_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    failures = FailureLog(clock)
    for number in range(10_000):
        failures.record(IntegrityError(f"frame {number}"))
    failures.record(FormatError("another kind"))
    assert len(caplog.messages) == 11
    assert caplog.messages[-1] == "FormatError: another kind"
    clock.now += 60
    failures.record(IntegrityError("frame 1"))
    assert caplog.messages[-1] == "IntegrityError: frame 1 (9990 similar left out)"
    assert isinstance(failures.last, IntegrityError)


def test_tracebacks_show_no_values(caplog: pytest.LogCaptureFixture) -> None:
    failures = FailureLog()

    def fail(secret: str) -> None:
        raise ZeroDivisionError

    try:
        fail("not for the log")
    except ZeroDivisionError as error:
        failures.record(error)
    with caplog.at_level(logging.DEBUG):
        assert "in fail" in caplog.text
    assert "for the log" not in caplog.text.replace('fail("not for the log")', "")
    assert failures.last is None


# Polling


class Idler:
    """Always ready to look, with nothing to do."""

    def may_look(self) -> bool:
        return True

    def work_ahead(self) -> bool:
        return False


async def _other_signature(timeout: float) -> bool:
    return bool(timeout)


def _no_coroutine() -> bool:
    return True


@pytest.mark.parametrize("replacement", [None, _other_signature, _no_coroutine, 5])
def test_without_the_seam_nothing_is_changed(replacement: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    if replacement is None:
        monkeypatch.delattr(pyfuse3, "_wait_fuse_readable")
    else:
        monkeypatch.setattr(pyfuse3, "_wait_fuse_readable", replacement)
    assert polling.install(0, Idler()) is None
    assert getattr(pyfuse3, "_wait_fuse_readable", None) is replacement


def test_one_cpu_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert polling.install(0, Idler()) is None


def test_installing_can_be_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    original = pyfuse3._wait_fuse_readable  # type: ignore[attr-defined]
    reading, writing = os.pipe()
    undo = polling.install(reading, Idler())
    assert undo is not None
    assert pyfuse3._wait_fuse_readable is not original  # type: ignore[attr-defined]
    undo()
    assert pyfuse3._wait_fuse_readable is original  # type: ignore[attr-defined]
    os.close(reading)
    os.close(writing)


# Going to the background. In a process of its own: pytest's may have threads.


def in_background(body: str, timeout: float = 60.0, before: str = "") -> subprocess.CompletedProcess[str]:
    script = (
        "import os, sys, time, signal\n"
        "from encfs.errors import *\n"
        "from encfs.mount.background import run_in_background\n"
        f"def main(report):\n    {body}\n    return 0\n{before}\n"
        f"try:\n    print(run_in_background(main, timeout={timeout}))\n"
        "except EncfsError as error:\n    print(type(error).__name__, error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )


def test_the_report_comes_back() -> None:
    assert in_background("report.ready({'x': 1}); time.sleep(1)").stdout == "{'x': 1}\n"


def test_errors_come_back_as_what_they_are() -> None:
    done = in_background("report.failed(PinError('the digest differs', hint='look'))")
    assert done.stdout == "PinError the digest differs; look\n"


@pytest.mark.parametrize("body", ["return 1", "os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError('x')"])
def test_a_silent_end_is_an_error(body: str) -> None:
    assert in_background(body).stdout.startswith("MountError the mount's daemon ended before it was ready")


def test_a_daemon_that_is_not_ready_in_time_is_ended(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    done = in_background(f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(600)", timeout=3.0)
    assert done.stdout.startswith("MountError the mount is not ready within 3 seconds")
    assert wait_for_end(int(pid_file.read_text()))


def test_an_interrupt_ends_a_daemon_that_has_only_just_started(tmp_path: Path) -> None:
    """Ctrl-C before it was read which process it is: the mount appeared although the command was given up."""
    pid_file = tmp_path / "pid"
    interrupted = f"""
def waitpid(*of, wait=os.waitpid):
    wait(*of)
    while not os.path.exists({str(pid_file)!r}):
        time.sleep(0.01)
    raise KeyboardInterrupt
os.waitpid = waitpid
"""
    body = f"open('{pid_file}.new', 'w').write(str(os.getpid())); os.rename('{pid_file}.new', '{pid_file}'); "
    done = in_background(body + "time.sleep(600)", before=interrupted)
    assert done.stderr.endswith("KeyboardInterrupt\n")
    assert wait_for_end(int(pid_file.read_text()))


def test_the_daemon_forbids_dumps() -> None:
    done = in_background(
        "import resource; report.ready({'limit': resource.getrlimit(resource.RLIMIT_CORE)[0],"
        " 'owner': os.stat('/proc/self/mem').st_uid, 'dumpable': __import__('ctypes').CDLL(None).prctl(3)})"
    )
    assert done.stdout == "{'limit': 0, 'owner': 0, 'dumpable': 0}\n"


# Where daemons are found


def test_the_runtime_directory_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "a" / "b"))
    assert existing_runtime_directory() is None
    assert runtime_directory() == existing_runtime_directory() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_the_runtime_directory_must_be_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "relative")
    with pytest.raises(StorageError, match="absolute"):
        runtime_directory()


def test_users_have_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    with pytest.raises(StorageError, match=str(tmp_path / "session" / "encfs")):
        runtime_directory()  # made by this test's user, who is not 4242
    assert (tmp_path / "session" / "encfs").is_dir()


# Log files


def test_every_log_file_is_private_and_no_link_is_followed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = os.umask(0o022)
    try:
        with logging_to(log):
            for _ in range(200):
                logging.getLogger("encfs.mount").error("x" * 10_000)
        assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {"log": 0o600, "log.1": 0o600}
    finally:
        os.umask(before)
    (tmp_path / "link").symlink_to("log")
    with pytest.raises(StorageError), logging_to(tmp_path / "link"):
        pytest.fail("unreachable")


# Probes


def test_a_lack_of_descriptors_does_not_end_what_answers(tmp_path: Path) -> None:
    program = """
import os, resource, socket, sys, trio
from encfs.mount import health
path = sys.argv[1]
server = health.listen_at(f"unix:{path}")
async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(health.serve, server, health.Probes(lambda: True, lambda: ""))
        await trio.sleep(0.1)
        client = socket.socket(socket.AF_UNIX)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = set(map(int, os.listdir("/proc/self/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(set(range(200)) - used), limits[1]))
        client.connect(path)
        client.sendall(b"GET /healthz HTTP/1.1\\r\\n\\r\\n")
        await trio.sleep(0.5)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        print((await trio.to_thread.run_sync(client.recv, 100)).splitlines()[0].decode())
        nursery.cancel_scope.cancel()
trio.run(main)
"""
    words = [sys.executable, "-c", program, tmp_path / "socket"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("HTTP/1.1 200 OK\n", 0), done.stderr
    assert list(tmp_path.iterdir()) == []


# Handing over


def test_what_a_daemon_has_begun_to_serve_is_kept_from_its_first_answer_on() -> None:
    """It may be killed before it says that it is ready: the kernel has kept what was read until then."""
    reading, writing = os.pipe()
    keeper = Keeper(writing, "/mount", b"request")
    reply = struct.pack("=IiQ", 16, 0, 1)
    first, second = ("sha256:" + digit * 64 for digit in "12")
    for digest in (first, second):
        event = {"event": "negotiated", "init_reply": base64.b64encode(reply).decode(), "content_digest": digest}
        keeper.note(event)
    keeper.note({"event": "ready", "status": {"content_digest": second}})
    assert (keeper.content_digest, keeper.init_reply) == (first, reply)
    keeper.close()
    with os.fdopen(reading, "rb") as file:
        assert file.read() == reply
