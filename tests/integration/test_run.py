"""Encrypted images run: the root filesystem, users, exit codes, signals, and that nothing is left behind."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from encfs.erofs.writer import Entry
from encfs.keys.files import write_key_files
from encfs.oci.layout import Layout
from tests.support.artifacts import ARTIFACT_ID, make_keys
from tests.support.image_artifacts import directory, encrypt_image, file, image_config, link
from tests.support.waiting import LONG, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

APPLETS = (b"sh", b"cat", b"echo", b"env", b"id", b"ls", b"mount", b"ps", b"pwd", b"sleep", b"stty", b"touch", b"true")
SHELL = ("--entrypoint", "/bin/sh", "-u", "0")
#: A user who may read this interpreter, and nothing more.
UNPRIVILEGED = (
    *("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"),
)
SECRET = "a secret that is encfs's own"


#: What an image has in the way of a mount or of users: a name of it, the exit code, and what is said.
HOSTILE = {
    "proc-is-a-link": (link(b"proc", b"/bin"), 40, "nothing can be mounted on /proc"),
    "dev-is-a-file": (file(b"dev", b""), 40, "/dev cannot be made in the container"),
    "etc-leads-out": (link(b"etc", b"/../../../../tmp"), 40, "/etc cannot be made in the container"),
    "resolv-is-a-directory": (directory(b"etc/resolv.conf"), 40, "nothing can be mounted on /etc/resolv.conf"),
    "passwd-is-a-pipe": ((Entry(b"etc/passwd", stat.S_IFIFO | 0o644), b""), 0, ""),
    "passwd-is-a-terminal": (
        (Entry(b"etc/passwd", stat.S_IFCHR | 0o644, rdev=os.makedev(5, 0)), b""),
        6,
        "the image's /etc/passwd cannot be read",
    ),
}


@dataclass(frozen=True)
class Images:
    """A layout with images, and how to open them."""

    base: Path

    def words(self, tag: str, *options: str, command: tuple[str, ...] = ()) -> list[str]:
        reference = f"oci:{self.base / 'layout'}:{tag}"
        trust = ["-k", str(self.base / "recipient.jwk"), "--trust", str(self.base / "signer.jwk.pub")]
        program = [sys.executable, "-c", "from encfs.cli import main; main()", "run", "-q", reference]
        trust += ["--id", ARTIFACT_ID, "--min-version", "0"]
        return [*program, *trust, *options, *(["--", *command] if command else [])]

    def run(
        self, tag: str, *options: str, command: tuple[str, ...] = (), prefix: tuple[str, ...] = (), stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, *self.words(tag, *options, command=command)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "ENCFS_TEST_SECRET": SECRET},
        )

    def sh(self, script: str, *options: str, tag: str = "app", **more: object) -> subprocess.CompletedProcess[str]:
        return self.run(tag, *SHELL, *options, command=("-c", script), **more)  # type: ignore[arg-type]

    @contextmanager
    def started(self, script: str, *options: str, first: str = ":") -> Iterator[subprocess.Popen[str]]:
        """A container whose command has done `first`, and then said `ready`."""
        words = self.words("app", *SHELL, *options, command=("-c", f"{first}; echo ready; {script}"))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    base = tmp_path_factory.mktemp("run")
    keys = make_keys(base)
    write_key_files(keys.signer, base / "signer.jwk")
    busybox = Path("/bin/busybox").read_bytes()
    bottom = [
        directory(b""),
        file(b"bin/busybox", busybox, 0o755),
        *(link(b"bin/" + name, b"busybox") for name in APPLETS),
        file(b"etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:\n"),
        file(b"etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n"),
        # Links that would lead out of the image, if anything followed them.
        link(b"etc/resolv.conf", b"../../../../../../etc/hostname"),
        link(b"outside", b"/"),
        directory(b"tmp", mode=0o1777),
    ]
    top = [directory(b""), file(b"work/data", b"from the top layer\n")]
    config = image_config(
        2,
        Entrypoint=["/bin/sh", "-c"],
        Cmd=["echo $GREETING; id; pwd; cat data"],
        Env=["GREETING=hello", "PATH=/bin"],
        WorkingDir="/work",
        User="app",
        StopSignal="SIGUSR1",
    )
    layout = Layout(base / "layout", create=True)
    encrypt_image(layout, [bottom, top], keys, config, tag="app")
    flat = [*bottom, file(b"work/data", b"flat\n")]
    encrypt_image(layout, [flat], keys, image_config(2, Cmd=["/bin/cat", "/work/data"]), tag="flat", flat=True)
    empty = [directory(b""), file(b"true", busybox, 0o755)]
    encrypt_image(layout, [empty], keys, image_config(1, Cmd=["/true"]), tag="empty")
    encrypt_image(layout, [empty], keys, image_config(1, architecture="s390x", Cmd=["/true"]), tag="foreign")
    for name, (extra, _, _) in HOSTILE.items():
        layers = [[*bottom[:4], extra]]
        encrypt_image(layout, layers, keys, image_config(1, Entrypoint=["/bin/sh", "-c"], Cmd=["ls /"]), tag=name)
    layout.close()
    return Images(base)


@pytest.mark.parametrize("backend", ["fuse", "erofs"])
def test_the_images_own_command(images: Images, backend: str) -> None:
    done = images.run("app", "--backend", backend)
    assert done.returncode == 0, done.stderr
    expected = ["hello", "uid=1000(app) gid=1000(app) groups=2000(extra)", "/work", "from the top layer"]
    assert done.stdout.splitlines() == expected


def test_flat_and_nearly_empty_images(images: Images) -> None:
    assert images.run("flat").stdout == "flat\n"
    done = images.run("empty", "--read-only")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "command", "code", "message"),
    [
        (SHELL, ("-c", "exit 7"), 7, ""),
        (SHELL, ("-c", "kill -9 $$"), 137, ""),
        (("--entrypoint", "nosuch"), (), 127, "nosuch cannot be run in the container: No such file"),
        (("--entrypoint", "/etc/passwd"), (), 126, "Permission denied"),
        (("-u", "nosuch"), (), 3, "the image knows no user nosuch"),
        (("--bind", "/nosuch:/x"), (), 40, "/nosuch cannot be bound: No such file"),
        (("--bind", "/etc:/etc/passwd/x"), (), 40, "cannot be made in the container: Not a directory"),
        (("--bind", "relative:/x"), (), 2, "absolute"),
        (("-e", "NOT_SET_ANYWHERE"), (), 2, "is not set here"),
        (("--json",), (), 2, "leave --json out"),
        (("--platform", "linux/s390x"), (), 7, "the image is for linux/amd64, not for linux/s390x"),
        (("--min-version", "9"), (), 33, "below the floor 9"),
    ],
)
def test_exit_codes(
    images: Images, options: tuple[str, ...], command: tuple[str, ...], code: int, message: str
) -> None:
    done = images.run("app", *options, command=command)
    assert done.returncode == code, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_other_platforms_and_things_that_are_no_images_are_refused(images: Images) -> None:
    done = images.run("foreign")
    assert done.returncode == 7
    assert "the image is for linux/s390x" in done.stderr


def test_the_container_sees_nothing_of_encfs(images: Images) -> None:
    done = images.sh("env; cat /proc/*/environ; ls /proc/self/fd /proc/1/fd; ls -d /proc/[0-9]*; mount; ls /outside/")
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout
    assert "recipient" not in done.stdout
    assert "encfs on / type overlay (rw,nosuid,nodev" in done.stdout
    # The first process, the shell, and what it runs; the listing's own descriptor is 3.
    lines = done.stdout.splitlines()
    assert {line for line in lines if line.isdecimal()} == {"0", "1", "2", "3"}
    assert len([line for line in lines if line.startswith("/proc/")]) == 3
    assert str(images.base) not in done.stdout


def test_devices_and_special_filesystems(images: Images) -> None:
    done = images.sh(
        "echo lost >/dev/null && ls /dev /dev/pts && cat /sys/kernel/ostype; touch /sys/x; touch /dev/shm/x && echo shm"
    )
    words = done.stdout.split()
    for name in ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "fd", "stdin"):
        assert name in words
    assert "shm" in words
    assert "/sys/x: Read-only file system" in done.stderr


def test_writing_is_in_memory_or_refused(images: Images, tmp_path: Path) -> None:
    script = "echo x >/new && cat /new; echo y >/work/data && cat /work/data; echo z >/tmp/t && cat /tmp/t"
    assert images.sh(script).stdout.split() == ["x", "y", "z"]
    done = images.sh(script + "; echo t >/t/f && cat /t/f", "--read-only", "--tmpfs", "/t")
    assert done.stdout.split() == ["z", "t"]
    assert done.stderr.count("Read-only file system") == 2
    (tmp_path / "f").write_text("bound\n")
    binds = ("--bind", f"{tmp_path}:/b", "--bind", f"{tmp_path / 'f'}:/deep/er/f:ro")
    done = images.sh("cat /deep/er/f; echo more >/deep/er/f; echo new >/b/n", *binds)
    assert done.stdout == "bound\n"
    assert "Read-only file system" in done.stderr
    assert (tmp_path / "n").read_text() == "new\n"


def test_host_files_never_follow_a_link_of_the_image(images: Images) -> None:
    here = Path("/etc/resolv.conf").read_text()
    assert images.sh("cat /etc/resolv.conf").stdout == here
    assert images.sh("ls /etc", "--no-host-files").stdout.split() == ["group", "passwd", "resolv.conf"]


def test_environment_directory_and_user(images: Images) -> None:
    options = ("-e", "A=1", "-e", "ENCFS_TEST_SECRET", "-w", "/a/new/one", "-u", "1234:extra")
    done = images.run("app", "--entrypoint", "/bin/sh", *options, command=("-c", "echo $A $HOME; pwd; id"))
    assert done.stdout.splitlines()[:2] == ["1 /", "/a/new/one"]
    assert done.stdout.splitlines()[2].startswith("uid=1234 gid=2000")
    # What is asked for by name is passed on.
    assert SECRET in images.sh("env", "-e", "ENCFS_TEST_SECRET").stdout


def test_standard_input_is_passed_through(images: Images) -> None:
    assert images.run("app", "--entrypoint", "/bin/cat", stdin="through\n").stdout == "through\n"


def test_privileges_are_not_gained_unless_asked_for(images: Images) -> None:
    for options, expected in (((), "1"), (("--new-privs",), "0")):
        done = images.sh("cat /proc/self/status", *options)
        assert f"NoNewPrivs:\t{expected}\n" in done.stdout


def test_sigterm_is_the_images_stop_signal(images: Images) -> None:
    trap = "trap 'echo stopped; exit 9' USR1"
    with images.started("while :; do sleep 0.05; done", first=trap) as process:
        process.terminate()
        assert process.communicate(timeout=LONG)[0] == "stopped\n"
        assert process.returncode == 9
    with images.started("exec sleep 100") as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(LONG) == 130


def test_nothing_is_left_after_the_end_or_a_kill(images: Images) -> None:
    mark = str(40_000 + os.getpid() % 20_000)
    done = images.sh(f"/bin/sleep {mark} & exit 3")
    assert done.returncode == 3
    assert _processes(mark) == 0
    with images.started(f"/bin/sleep {mark} & exec /bin/sleep {mark}") as process:
        wait_until(lambda: _processes(mark) == 2)
        process.kill()
        process.wait(LONG)
        wait_until(lambda: _processes(mark) == 0)
    assert str(images.base) not in Path("/proc/self/mountinfo").read_text()


def _processes(mark: str) -> int:
    found = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_bytes() == b"/bin/sleep\0%s\0" % mark.encode()
        except OSError:
            continue
    return found


def test_the_terminal_interrupts_the_command(images: Images) -> None:
    script = "trap 'echo interrupted; exit 5' INT; stty -echo; echo ready; while :; do sleep 0.05; done"
    words = images.words("app", *SHELL, command=("-c", script))
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(words[0], words)  # noqa: S606 - in a child of the test
    try:
        _read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        assert _read_until(terminal, b"interrupted").count(b"interrupted") == 1
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
    finally:
        os.close(terminal)


def _read_until(terminal: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 4096)
    return seen


def test_without_root_in_a_user_namespace(images: Images, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path / "none"), "--cache-size", "0")
    script = "id; cat data; echo x >/new && cat /new; touch /etc/passwd && echo changed; mount | cat"
    done = images.sh(script, *cache, prefix=UNPRIVILEGED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ["uid=0(root) gid=0(root)", "from the top layer", "x", "changed"]
    assert "encfs on / type overlay" in done.stdout
    done = images.run("app", *cache, prefix=UNPRIVILEGED)
    assert done.returncode == 40
    assert "cannot run as user 1000" in done.stderr
    done = images.run("app", *cache, "--backend", "erofs", prefix=UNPRIVILEGED)
    assert done.returncode == 40
    assert "the kernel's EROFS cannot be used" in done.stderr


def with_ranges(path: Path, ranges: str) -> tuple[str, ...]:
    """As that user, to whom this machine gives these ranges of users and groups (subuid(5)); seen by nobody else."""
    path.write_text(ranges)
    script = 'mount --bind "$1" /etc/subuid && mount --bind "$1" /etc/subgid && shift && exec "$@"'
    return ("unshare", "--mount", "sh", "-c", script, "sh", str(path), *UNPRIVILEGED)


needs_newuidmap = pytest.mark.skipif(not shutil.which("newuidmap"), reason="newuidmap (uidmap) is not installed")


@needs_newuidmap
def test_without_root_with_the_ranges_of_the_machine(images: Images, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path / "none"), "--cache-size", "0")
    ranges = with_ranges(tmp_path / "subuid", "1000:100000:1500\nother:300000:65536\n1000:200000:65536\nnonsense\n")
    # The image's own user, with the group that lists it, which is in the second range.
    done = images.run("app", *cache, prefix=ranges)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1] == "uid=1000(app) gid=1000(app) groups=2000(extra)"
    done = images.sh("cat /proc/self/uid_map; touch /new && ls -ln /new", *cache, "-u", "app", prefix=ranges)
    assert "Permission denied" in done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["0", "1000", "1"],
        ["1", "100000", "1500"],
        ["1501", "200000", "65536"],
    ]
    done = images.sh("touch /tmp/new && ls -ln /tmp/new", *cache, "-u", "67036:67036", prefix=ranges)
    assert done.stdout.split()[2:4] == ["67036", "67036"], done.stderr
    done = images.sh("true", *cache, "-u", "67037", prefix=ranges)
    assert done.returncode == 40
    assert "end before user 67037" in done.stderr


@needs_newuidmap
def test_without_ranges_or_with_unfit_ones_it_is_said(images: Images, tmp_path: Path) -> None:
    cache = ("--cache-dir", str(tmp_path / "none"), "--cache-size", "0")
    done = images.run("app", *cache, prefix=with_ranges(tmp_path / "none", ""))
    assert done.returncode == 40
    assert "cannot run as user 1000, group 1000: this user has no range" in done.stderr
    # Two ranges that overlap: the kernel takes no such map, and this user is alone in there.
    overlap = with_ranges(tmp_path / "overlap", "1000:1000:65536\n")
    done = images.run("app", *cache, prefix=overlap)
    assert done.returncode == 40
    assert "refuses the ranges" in done.stderr
    done = images.sh("id", *cache, prefix=overlap)
    assert done.stdout == "uid=0(root) gid=0(root)\n", done.stderr


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_in_the_way_leads_nowhere(images: Images, name: str) -> None:
    _, code, message = HOSTILE[name]
    before = sorted(os.listdir("/tmp"))  # noqa: S108 - where one of them leads
    done = images.run(name)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not {"resolv.conf", "hosts"} & (set(os.listdir("/tmp")) - set(before))  # noqa: S108


def test_what_does_not_verify_is_an_input_error_and_said(images: Images, tmp_path: Path) -> None:
    subprocess.run(["cp", "-r", str(images.base / "layout"), str(tmp_path / "layout")], check=True)
    for name in ("recipient.jwk", "signer.jwk.pub"):
        (tmp_path / name).symlink_to(images.base / name)
    for blob in (tmp_path / "layout" / "blobs" / "sha256").iterdir():
        # Of each segment the second half: the contents, not what is read to mount it.
        size = blob.stat().st_size
        if size > 1 << 20:
            with open(blob, "r+b") as file:
                file.seek(size // 4)
                file.write(os.urandom(size // 4))
    done = Images(tmp_path).sh("cat /bin/busybox >/dev/null")
    assert done.returncode != 0
    assert "stored bytes are not what the root commits to" in done.stderr


#: The container's process is killed when it has handed over the device, and nobody serves it yet.
_KILLED_EARLY = """
import array, fcntl, os, signal, termios, time
from types import SimpleNamespace
from encfs.container.process import ContainerProcess
from encfs.container.serve import serve
from encfs.container.spec import Spec
from encfs.errors import MountError

spec = Spec(("true",), {}, "0", "/", (), (), False, False, False, 1, "fuse")
with ContainerProcess() as process:
    waiting = array.array("i", [0])
    while waiting[0] < 8:
        time.sleep(0.01)
        fcntl.ioctl(process.channel, termios.FIONREAD, waiting)
    process.signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    contents = SimpleNamespace(image=SimpleNamespace(root=36), bind_to_loop=lambda: None)
    outcome = serve(process, contents, spec)
assert outcome.code == MountError.exit_code, outcome
assert "ended without a word" in outcome.error.message
"""


def test_a_container_that_is_killed_before_it_begins_is_an_error_of_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_EARLY], capture_output=True, text=True, timeout=LONG, check=False
    )
    assert done.returncode == 0, done.stderr
