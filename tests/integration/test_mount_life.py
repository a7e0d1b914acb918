"""The life of a mount: how it starts and ends, what it leaves behind (nothing), and what becomes of a killed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from encfs.errors import FormatError, IntegrityError, MountError, NotMountedError, StorageError
from encfs.mount import MountOptions, MountStatus, choose_shape, mount
from encfs.mount.holders import find_holders
from encfs.mount.mountpoint import top_mount
from tests.support.mounts import (
    REPOSITORY,
    FileVolume,
    detach_all,
    end,
    end_mount,
    is_mounted,
    known_mounts,
    make_image,
    mount_command,
    mounted,
    runtime_directory,
    start_mount,
    wait_for_end,
)

pytestmark = [pytest.mark.fuse, pytest.mark.root]


class Place:
    """An image, a mount point and a runtime directory; whatever is mounted at the end is detached."""

    def __init__(self, base: Path) -> None:
        self.image, self.mount, self.run = base / "image", base / "mount", base / "run"

    def start(self, *options: str) -> MountStatus:
        return start_mount(self.image, self.mount, self.run, *options)

    def statuses(self) -> list[MountStatus]:
        return [status for status in known_mounts(self.run) if status.mountpoint == str(self.mount)]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.run.iterdir()) if self.run.exists() else []

    def assert_nothing_is_left(self, pid: int) -> None:
        assert wait_for_end(pid)
        assert not is_mounted(self.mount)
        assert self.files() == []
        assert list(self.mount.iterdir()) == []


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("image")
    (base / "source").mkdir()
    (base / "source" / "hello").write_text("hello\n")
    (base / "source" / "large").write_bytes(os.urandom(8 << 20))
    return make_image(base / "source", base / "image")


@pytest.fixture
def place(tmp_path: Path, image: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    place.image = image
    place.mount.mkdir()
    yield place
    pids = [status.pid for status in known_mounts(place.run) if status.pid]
    detach_all(place.mount)
    for pid in pids:
        end(pid)


# Start


def test_background_mount_answers_when_the_command_returns(place: Place) -> None:
    status = place.start()
    assert sorted(os.listdir(place.mount)) == ["hello", "large"]
    assert (status.mountpoint, status.state) == (str(place.mount), "serving")
    assert os.getsid(status.pid) != os.getsid(0)
    assert Path(f"/proc/{status.pid}/cwd").readlink() == Path("/")
    for stream in (0, 1, 2):
        assert Path(f"/proc/{status.pid}/fd/{stream}").readlink() == Path("/dev/null")
    end_mount(place.run, place.mount)
    place.assert_nothing_is_left(status.pid)


def test_foreground_mount_says_when_it_is_ready(place: Place) -> None:
    with foreground(place) as (process, status):
        assert status.pid == process.pid
        assert (place.mount / "hello").read_text() == "hello\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    place.assert_nothing_is_left(process.pid)


class foreground:  # noqa: N801 - a context manager
    """A foreground mount in a process of its own, and the status that it prints once it is ready."""

    def __init__(self, place: Place, *options: str) -> None:
        self.process = subprocess.Popen(
            mount_command(place.image, place.mount, "--foreground", *options),
            cwd=REPOSITORY,
            env={**os.environ, "ENCFS_RUNTIME_DIR": str(place.run)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> tuple[subprocess.Popen[str], MountStatus]:
        assert self.process.stdout is not None
        return self.process, MountStatus(**json.loads(self.process.stdout.readline()))

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("missing", "the mount point .* does not exist; create it: mkdir -p"),
        ("file", "the mount point .* is no directory"),
        ("mounted", "is already mounted; unmount it first: encfs umount"),
    ],
)
def test_unfit_mount_points_are_refused(place: Place, prepare: str, message: str) -> None:
    if prepare != "mounted":
        place.mount.rmdir()
    if prepare == "file":
        place.mount.touch()
    with runtime_directory(place.run):
        if prepare == "mounted":
            place.start()
        with pytest.raises(MountError, match=message):
            mount(choose_shape([FileVolume(place.image)], MountOptions()), place.mount)


def test_mounting_over_another_filesystem_is_fine(place: Place) -> None:
    """A pod mounts on a volume that is a mount point already."""
    subprocess.run(["mount", "-t", "tmpfs", "none", place.mount], check=True)
    try:
        status = place.start()
        assert (place.mount / "hello").exists()
        end_mount(place.run, place.mount)
        assert wait_for_end(status.pid)
        assert list(place.mount.iterdir()) == []
    finally:
        subprocess.run(["umount", place.mount], check=True)


def test_the_volume_is_closed_when_mounting_fails(place: Place) -> None:
    volume = FileVolume(place.image)
    with runtime_directory(place.run), pytest.raises(MountError):
        mount(choose_shape([volume], MountOptions()), place.mount / "missing")
    with pytest.raises(OSError, match="Bad file descriptor"):
        volume.read(0, 1)


def test_no_image_is_a_format_error(place: Place, tmp_path: Path) -> None:
    (tmp_path / "random").write_bytes(os.urandom(100_000))
    with runtime_directory(place.run), pytest.raises(FormatError):
        mount(choose_shape([FileVolume(tmp_path / "random")], MountOptions()), place.mount)
    assert not is_mounted(place.mount)


def test_a_root_directory_that_does_not_verify_fails_the_mount(place: Place, tmp_path: Path) -> None:
    """The daemon meets it, in its own process; the caller gets the same error, and nothing stays behind."""
    (tmp_path / "many").mkdir()
    for number in range(6000):
        (tmp_path / "many" / f"{number:05}-{'n' * 40}").touch()
    place.image = make_image(tmp_path / "many", tmp_path / "many.image")
    with pytest.raises(
        AssertionError, match=f"{IntegrityError.exit_code}: test volume: frame .* not what the root says"
    ):
        place.start("--broken", f"{65536}-{1 << 30}")
    assert not is_mounted(place.mount)
    assert place.files() == []


def test_a_process_with_threads_stays_in_the_foreground(place: Place) -> None:
    script = (
        "import threading, time; from tests.support.mounts import main; import sys\n"
        "threading.Thread(target=time.sleep, args=(2,), daemon=True).start()\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, place.image, place.mount],
        cwd=REPOSITORY,
        env={**os.environ, "ENCFS_RUNTIME_DIR": str(place.run)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == MountError.exit_code
    assert "several threads" in done.stderr
    assert not is_mounted(place.mount)


# End


def test_sigterm_and_sigint_end_a_mount(place: Place) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        status = place.start()
        os.kill(status.pid, number)
        place.assert_nothing_is_left(status.pid)


def test_sigterm_ends_a_mount_that_is_in_use(place: Place) -> None:
    status = place.start()
    with held_open(place.mount / "large") as file:
        assert len(os.pread(file, 4096, 0)) == 4096
        os.kill(status.pid, signal.SIGTERM)
        place.assert_nothing_is_left(status.pid)
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.pread(file, 4096, 7 << 20)


@contextmanager
def held_open(path: Path) -> Iterator[int]:
    """A descriptor; closing one whose filesystem has gone is an error that says nothing new."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        with suppress(OSError):
            os.close(descriptor)


@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]])
def test_unmounting_from_outside_ends_the_daemon(place: Place, command: list[str]) -> None:
    status = place.start()
    subprocess.run([*command, place.mount], check=True)
    place.assert_nothing_is_left(status.pid)


def test_a_severed_connection_ends_the_daemon(place: Place) -> None:
    """The administrator's last resort: /sys/fs/fuse/connections/N/abort. The kernel leaves the mount; we do not."""
    status = place.start()
    control = Path("/sys/fs/fuse/connections")
    if not any(control.iterdir()):
        subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    (control / status.device.partition(":")[2] / "abort").write_text("1")
    place.assert_nothing_is_left(status.pid)


def test_umount_of_what_is_not_mounted(place: Place) -> None:
    with pytest.raises(NotMountedError, match="encfs status lists the mounts"):
        end_mount(place.run, place.mount)
    with pytest.raises(NotMountedError):
        end_mount(place.run, Path("/proc"))


def test_a_busy_mount_names_who_holds_it(place: Place) -> None:
    status = place.start()
    with subprocess.Popen(["sleep", "60"], cwd=place.mount) as holder:
        try:
            with pytest.raises(MountError, match=rf"is in use by {holder.pid} \(sleep\); .*--lazy.*--force"):
                end_mount(place.run, place.mount)
        finally:
            holder.kill()
    assert (place.mount / "hello").read_text() == "hello\n"
    end_mount(place.run, place.mount)
    place.assert_nothing_is_left(status.pid)


def test_a_mount_that_is_looked_at_for_a_moment_is_unmounted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open directory on its way through a socket is nobody's, as the lookup of a path by another process is."""
    status = place.start()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        directory = os.open(place.mount, os.O_RDONLY)
        socket.send_fds(ours, [b"x"], [directory])
        os.close(directory)
        with pytest.raises(MountError, match=r"is in use; end what uses it"):
            end_mount(place.run, place.mount)

        def look(mountpoint: str) -> list[str]:
            theirs.close()
            return find_holders(mountpoint)

        monkeypatch.setattr("encfs.mount.client.find_holders", look)
        end_mount(place.run, place.mount)
    place.assert_nothing_is_left(status.pid)


def test_a_lazy_umount_lasts_until_the_last_user_is_gone(place: Place) -> None:
    status = place.start()
    with open(place.mount / "large", "rb") as file:
        end_mount(place.run, place.mount, lazy=True)
        assert not is_mounted(place.mount)
        assert [status.state for status in place.statuses()] == ["detached"]
        assert len(os.pread(file.fileno(), 1 << 20, 4 << 20)) == 1 << 20
        # The place is free: a second mount does not disturb the first.
        second = place.start()
        assert len(os.pread(file.fileno(), 1 << 20, 6 << 20)) == 1 << 20
        assert sorted(status.state for status in place.statuses()) == ["detached", "serving"]
    assert wait_for_end(status.pid)
    assert [status.pid for status in place.statuses()] == [second.pid]
    end_mount(place.run, place.mount)
    place.assert_nothing_is_left(second.pid)


def test_ending_a_detached_daemon_leaves_the_new_mount_alone(place: Place) -> None:
    first = place.start()
    with held_open(place.mount / "hello"):
        end_mount(place.run, place.mount, lazy=True)
        place.start()
        os.kill(first.pid, signal.SIGTERM)
        assert wait_for_end(first.pid)
        assert (place.mount / "hello").read_text() == "hello\n"


def test_a_forced_umount_ends_a_busy_mount(place: Place) -> None:
    status = place.start()
    with held_open(place.mount / "large") as file:
        end_mount(place.run, place.mount, force=True)
        place.assert_nothing_is_left(status.pid)
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.pread(file, 4096, 7 << 20)


def test_a_second_place_of_the_same_mount_lives_on(place: Place, tmp_path: Path) -> None:
    status = place.start()
    (tmp_path / "second").mkdir()
    subprocess.run(["mount", "--bind", place.mount, tmp_path / "second"], check=True)
    try:
        assert {found.mountpoint for found in known_mounts(place.run)} >= {str(place.mount), str(tmp_path / "second")}
        end_mount(place.run, place.mount)
        assert (tmp_path / "second" / "hello").read_text() == "hello\n"
    finally:
        end_mount(place.run, tmp_path / "second")
    place.assert_nothing_is_left(status.pid)


# A killed daemon


def kill(status: MountStatus) -> None:
    os.kill(status.pid, signal.SIGKILL)
    assert wait_for_end(status.pid)


def test_a_new_mount_replaces_one_whose_daemon_was_killed(place: Place) -> None:
    for _ in range(3):
        status = place.start()
        kill(status)
        with pytest.raises(OSError, match="not connected"):
            os.listdir(place.mount)
        assert [found.state for found in place.statuses()] == ["dead"]
    status = place.start()
    assert (place.mount / "hello").read_text() == "hello\n"
    assert len(place.files()) == 2
    end_mount(place.run, place.mount)
    place.assert_nothing_is_left(status.pid)


def test_umount_clears_what_a_killed_daemon_left(place: Place) -> None:
    status = place.start()
    with held_open(place.mount / "hello"):
        kill(status)
        end_mount(place.run, place.mount)
    place.assert_nothing_is_left(status.pid)


def test_a_dead_mount_of_another_filesystem_is_left_alone(place: Place) -> None:
    script = (
        "import os, signal, sys, pyfuse3\n"
        "pyfuse3.init(pyfuse3.Operations(), sys.argv[1], {'fsname=other', 'subtype=other'})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, place.mount], check=False)
    with (
        runtime_directory(place.run),
        pytest.raises(MountError, match=r"dead mount of another filesystem \(fuse.other\)"),
    ):
        mount(choose_shape([FileVolume(place.image)], MountOptions()), place.mount)
    other = top_mount(str(place.mount))
    assert other is not None
    assert other.filesystem_type == "fuse.other"


# Status and control


def test_status_tells_everything(place: Place) -> None:
    before = time.time()
    status = place.start()
    (place.mount / "large").read_bytes()
    (found,) = place.statuses()
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
    assert (found.mountpoint, found.state, found.pid) == (str(place.mount), "serving", status.pid)
    assert (found.reference, found.content_digest) == (f"path:{place.image}", "sha256:" + "0" * 64)
    assert before - 1 < found.started < time.time()
    assert found.stats["bytes_read"] >= 8 << 20
    assert found.stats["requests_failed"] == 0
    assert found.read_ahead == 1 << 20
    assert found.device == f"{os.major(place.mount.stat().st_dev)}:{os.minor(place.mount.stat().st_dev)}"


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"no json\n", b"[]\n", b'{"op": "explode"}\n', b'{"op": ["status"]}\n', b"[" * 4000, b"x" * 100_000],
)
def test_nonsense_on_the_control_socket_is_answered_and_forgotten(place: Place, line: bytes) -> None:
    place.start()
    (path,) = place.run.glob("*.sock")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(f"/proc/self/fd/{os.open(place.run, os.O_RDONLY)}/{path.name}")
        try:
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer = b""
    assert not answer or json.loads(answer)["ok"] is False
    assert len(place.statuses()) == 1


def test_the_runtime_directory_is_private(place: Place) -> None:
    place.start()
    assert stat.S_IMODE(place.run.stat().st_mode) == 0o700
    for path in place.run.iterdir():
        assert not path.stat().st_mode & 0o077, path


@pytest.mark.parametrize("fault", ["open to others", "of another user", "no directory", "symbolic link"])
def test_an_unsafe_runtime_directory_is_refused(place: Place, fault: str) -> None:
    if fault == "no directory":
        place.run.touch()
    elif fault == "symbolic link":
        place.mount.chmod(0o700)
        place.run.symlink_to(place.mount)
    else:
        place.run.mkdir(mode=0o755 if fault == "open to others" else 0o700)
        if fault == "of another user":
            os.chown(place.run, 1000, 1000)
    with runtime_directory(place.run), pytest.raises(StorageError, match="runtime directory"):
        mount(choose_shape([FileVolume(place.image)], MountOptions()), place.mount)
    # Nothing is left for the clean-up to look at.
    place.run = place.run.with_name("none")


def test_long_paths_have_control_sockets_too(tmp_path: Path, image: Path) -> None:
    """A socket's address has 107 bytes."""
    deep = tmp_path / ("d" * 200)
    deep.mkdir()
    with mounted(image, deep / "mount", deep / "run") as status:
        assert [found.pid for found in known_mounts(deep / "run") if found.state == "serving"] == [status.pid]
        end_mount(deep / "run", deep / "mount")


def test_odd_mount_point_names(tmp_path: Path, image: Path) -> None:
    """The kernel escapes them in mountinfo, and users reach them through links."""
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("with space", "tab\there", "back\\slash", "new\nline", "größe", "#hash"):
        with mounted(image, tmp_path / "link" / name, tmp_path / "run") as status:
            assert status.mountpoint == str(tmp_path / name)
            end_mount(tmp_path / "run", tmp_path / "link" / name)
            assert not is_mounted(tmp_path / name)


# Users other than root


class UserPlace:
    """A place of a user without rights, in a mount namespace of its own, where anybody may open /dev/fuse as usual."""

    def __init__(self, base: Path, image: Path) -> None:
        self.base = base
        base.chmod(0o755)
        shutil.copy(image, base / "image")
        (base / "image").chmod(0o644)
        (base / "dev").mkdir()
        for name in ("mount", "run"):
            (base / name).mkdir(mode=0o700)
            os.chown(base / name, 1000, 1000)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """A shell script with `user COMMAND`, `encfs_mount OPTIONS`, `encfs_client STATEMENT`: without rights."""
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _PREAMBLE + script],
            cwd=REPOSITORY,
            env={**os.environ, "ENCFS_RUNTIME_DIR": str(self.base / "run"), "B": str(self.base), "PY": sys.executable},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


#: The interpreter may be installed where users cannot go: it imports everything before it drops its rights.
_PREAMBLE = """
# The namespace begins with a copy of every mount: those of other tests must be able to end.
"$PY" -c "
from contextlib import suppress
from encfs.mount.mountpoint import current_mounts, unmount
for mount in current_mounts():
    if mount.filesystem_type == 'fuse.encfs':
        with suppress(Exception): unmount(mount.mountpoint, lazy=True)"
mount -t tmpfs -o mode=755 none "$B/dev"
mknod -m 666 "$B/dev/fuse" c 10 229
mount --bind "$B/dev/fuse" /dev/fuse
user() { setpriv --reuid 1000 --regid 1000 --clear-groups "$@"; }
encfs_mount() { "$PY" -m tests.support.mounts "$B/image" "$B/mount" --user 1000 "$@"; }
encfs_client() { "$PY" -c "import os, sys
from encfs.mount.client import mounts, umount
os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
$1" "$B/mount"; }
pid() { "$PY" -c "import json, sys; print(json.load(sys.stdin)['pid'])"; }
gone() { for i in $(seq 200); do test -e "/proc/$1" || return 0; sleep 0.05; done; echo "$1 is still there"; return 1; }
"""


@pytest.fixture
def user_place(image: Path) -> Iterator[UserPlace]:
    base = Path(tempfile.mkdtemp(prefix="encfs-test-"))
    try:
        yield UserPlace(base, image)
    finally:
        shutil.rmtree(base)


def test_a_user_mounts_and_unmounts(user_place: UserPlace) -> None:
    """Through fusermount3, which alone has the right to mount."""
    done = user_place.run("""
        daemon=$(encfs_mount | pid)
        grep fuse.encfs /proc/self/mountinfo | grep -F "$B/mount ro,nosuid,nodev" | wc -l
        user cat "$B/mount/hello"
        encfs_client "print([status.state for status in mounts() if status.mountpoint == sys.argv[1]])"
        encfs_client "umount(sys.argv[1])"
        gone "$daemon"
        grep -c "$B/mount" /proc/self/mountinfo || true
        find "$B/run" -mindepth 1
    """)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1\nhello\n['serving']\n0\n"


def test_a_user_recovers_from_a_killed_daemon(user_place: UserPlace) -> None:
    done = user_place.run("""
        daemon=$(encfs_mount | pid); kill -KILL "$daemon"; gone "$daemon"
        user ls "$B/mount" 2>&1 | grep -c "not connected"
        daemon=$(encfs_mount | pid)
        user cat "$B/mount/hello"
        kill -TERM "$daemon"; gone "$daemon"
        grep -c "$B/mount" /proc/self/mountinfo || true
        find "$B/run" -mindepth 1
    """)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"clearing the mount that a killed daemon left at \S+\n", done.stderr)
    assert done.stdout == "1\nhello\n0\n"


def test_a_user_is_told_who_holds_a_mount(user_place: UserPlace) -> None:
    done = user_place.run("""
        daemon=$(encfs_mount | pid)
        setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'exec sleep 30 < "$B/mount/hello"' & holder=$!
        while ! readlink "/proc/$holder/fd/0" | grep -q hello; do sleep 0.05; done
        encfs_client "
try: umount(sys.argv[1])
except Exception as error: print(error)"
        kill "$holder"; wait "$holder" || true
        encfs_client "umount(sys.argv[1])"
        gone "$daemon"
    """)
    assert done.returncode == 0, done.stderr
    assert re.search(r"is in use by \d+ \(sleep\); .*--lazy", done.stdout)


@pytest.mark.parametrize(
    ("setup", "options", "message"),
    [
        ("", "--allow-other", "allow_other is not permitted .* user_allow_other"),
        ('chown 0:0 "$B/mount"; chmod 755 "$B/mount"', "", "cannot be mounted: .*no write access"),
        ("chmod 600 /dev/fuse", "", "/dev/fuse cannot be opened: Permission denied"),
        ("mount --bind /dev/null $(command -v fusermount3)", "", "fusermount3 is needed to mount without root"),
    ],
)
def test_what_a_user_lacks_is_said(user_place: UserPlace, setup: str, options: str, message: str) -> None:
    done = user_place.run(f"{setup}\nencfs_mount {options}")
    assert done.returncode == MountError.exit_code
    assert re.search(message, done.stderr), done.stderr
    assert list((user_place.base / "run").iterdir()) == []
