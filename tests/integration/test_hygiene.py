"""What keys leave behind: nothing in arguments, environment, logs, tracebacks or core files of what runs with them."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from encfs.keys.secrets import SymmetricKey
from tests.integration.test_tpm_sealing import ok
from tests.support.broker import make_broker, serving
from tests.support.tpm import SoftwareTpm, tpm

__all__ = ["tpm"]

ENCFS = (sys.executable, "-c", "from encfs.cli import main; main()")
SECRET = bytes(range(200, 232))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with an artifact `oci:a:t` for `kek.jwk`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENCFS_RUNTIME_DIR", str(tmp_path / "run"))
    ok("imagetool", "keygen", "-o", "kek.jwk", "--type", "oct")
    Path("data").mkdir()
    (Path("data") / "file").write_bytes(b"content")
    ok("imagetool", "encrypt", "data", "oci:a:t", "-r", "kek.jwk")
    return tmp_path


def secrets(place: Path) -> list[bytes]:
    """The key in the forms in which it could be written."""
    import base64

    text = json.loads((place / "kek.jwk").read_text())["k"]
    raw = base64.urlsafe_b64decode(text + "==")
    return [text.encode(), raw, raw.hex().encode(), base64.b64encode(raw)]


def pin(place: Path) -> str:
    return str(json.loads(ok("imagetool", "inspect", "oci:a:t", "--json"))["content_digest"])


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_a_mount_leaves_no_secret_around(place: Path) -> None:
    (place / "m").mkdir()
    command = [
        "mount",
        "oci:a:t",
        "m",
        "-k",
        "file:kek.jwk",
        "--pin",
        pin(place),
        "--debug",
        "--log-file",
        "log",
        "--json",
    ]
    done = subprocess.run([*ENCFS, *command], capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    try:
        pid = int(json.loads(done.stdout)["pid"])
        assert (place / "m" / "file").read_bytes() == b"content"
        traces = [done.stdout, done.stderr, (place / "log").read_bytes()]
        traces += [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
        for trace in traces:
            assert not any(secret in trace for secret in secrets(place))
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
        if os.geteuid() == 0:
            locked = re.search(r"^VmLck:\s+(\d+) kB", status_of(pid), re.MULTILINE)
            assert locked is not None
            assert int(locked[1]) > 1024, "root may lock memory, so the daemon's is"
    finally:
        ok("encfs", "umount", "m")


def test_commands_leave_no_core_file() -> None:
    code = (
        "import resource, sys\n"
        "from encfs.console import commandline\n"
        "from encfs.cli import app\n"
        "try: commandline.main(app, 'encfs', ['--version'])\n"
        "except SystemExit: print(resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    assert limit != 0, "core files are forbidden here anyway: nothing would be tested"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "0", done.stderr


def test_no_key_in_repr_or_traceback() -> None:
    key = SymmetricKey(bytearray(SECRET), "name")
    shown = f"{key!r} {key}"
    assert "name" in shown
    assert not any(form in shown for form in (SECRET.hex(), repr(SECRET), repr(bytearray(SECRET)), str(list(SECRET))))


def test_a_failure_with_debug_shows_no_secret(place: Path) -> None:
    # A passphrase that does not open it, and a key file that is none: the tracebacks have no locals.
    (place / "wrong").write_bytes(b"correct horse battery")
    (place / "broken.jwk").write_text(json.dumps({"kty": "oct", "k": "c2VjcmV0LXRoYXQtaXMtdG9vLXNob3J0"}))
    for path in ("wrong", "broken.jwk"):
        (place / path).chmod(0o600)
    for uri in ("passphrase:file=wrong", "broken.jwk"):
        done = subprocess.run(
            [*ENCFS, "ls", "oci:a:t", "-k", uri, "--pin", pin(place), "--debug"],
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode in (20, 22)
        assert b"Traceback" in done.stderr
        for secret in (b"correct horse", b"c2VjcmV0LXRo", b"secret-that-is"):
            assert secret not in done.stderr + done.stdout


def test_no_key_on_a_terminal(place: Path, tpm: SoftwareTpm) -> None:
    tpm.extend(7)
    ok("encfs", "seal", "kek.jwk", "-o", "kek.tpm", "--tpm2-pcrs", "sha256:7")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [*ENCFS, "unseal", "kek.tpm"],
            stdout=theirs,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
        assert done.returncode == 2
        assert b"does not show a key on a terminal; give -o FILE" in done.stderr
        os.set_blocking(ours, False)
        with pytest.raises(BlockingIOError):
            os.read(ours, 1)
    finally:
        os.close(ours)
        os.close(theirs)
    # Elsewhere it is what it was asked for.
    assert json.loads(ok("encfs", "unseal", "kek.tpm"))["k"] == json.loads((place / "kek.jwk").read_text())["k"]


#: Prints what protects this process: the core file limit, whether others may look, locked kB.
_SHOW = """
import atexit, ctypes, re, resource
def show():
    limit = resource.getrlimit(resource.RLIMIT_CORE)
    locked = re.search(r"VmLck:\\s+(\\d+)", open("/proc/self/status").read())[1]
    print("\\nPROTECTION", *limit, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), locked)
atexit.register(show)
"""


def protection(program: str, *words: str, prefix: Sequence[str] = ()) -> tuple[int, int, int, int]:
    """Of a command at its end: soft and hard limit of core files, PR_GET_DUMPABLE, locked kB."""
    code = f"{_SHOW}\nfrom {program}.cli import main\nmain()"
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code, *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"PROTECTION (\d+) (-?\d+) (\d+) (\d+)", done.stdout)
    assert found is not None, done.stdout
    return tuple(map(int, found.groups()))  # type: ignore[return-value]


def test_every_command_with_keys_is_protected(place: Path) -> None:
    opening = ("-k", "kek.jwk", "--pin", pin(place))
    ok("imagetool", "keygen", "-o", "owner.jwk", "--type", "ed25519")
    commands = [
        ("imagetool", "keygen", "-o", "new.jwk"),
        ("imagetool", "encrypt", "data", "oci:b:t", "-r", "kek.jwk"),
        ("imagetool", "decrypt", "oci:a:t", "out", *opening),
        ("imagetool", "verify", "oci:a:t", *opening),
        ("imagetool", "recipients", "add", "oci:a:t", "-r", "new.jwk.pub", *opening),
        ("imagetool", "sign", "oci:a:t", "--key", "owner.jwk", "--pin", pin(place)),
        ("imagetool", "broker", "init", "broker"),
        ("imagetool", "broker", "key", "add", "broker", "default/key/chat", "--kek", "kek.jwk"),
        ("encfs", "extract", "oci:a:t", "extracted", *opening),
        ("encfs", "cat", "oci:a:t", "file", *opening),
        ("encfs", "ls", "oci:a:t", *opening),
    ]
    for program, *words in commands:
        soft, hard, dumpable, locked = protection(program, *words)
        assert (soft, hard, dumpable) == (0, 0, 0), words
        assert locked > 1024 or os.geteuid() != 0, words
    # What holds no key keeps to the soft limit.
    assert protection("imagetool", "inspect", "oci:a:t")[1:3] != (0, 0)


@pytest.mark.root
def test_memory_that_may_not_be_locked_is_a_line_in_the_log(place: Path) -> None:
    words = ("cat", "oci:a:t", "file", "-k", "kek.jwk", "--pin", pin(place), "--debug")
    prefix = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
    *kept, locked = protection("encfs", *words, prefix=prefix)
    assert (kept, locked) == ([0, 0, 0], 0)
    done = subprocess.run([*prefix, *ENCFS, *words], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0
    assert done.stdout == b"content"
    assert b"memory is not locked: the limit on locked memory is too low" in done.stderr


@pytest.mark.root
def test_an_unprivileged_user_works_with_protected_keys(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a process is not dumpable: what it does through /proc/self goes on working."""
    digest = pin(place)
    # pytest's own directories are the user's alone that runs it.
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory) / "home"
        shutil.copytree(place, home)
        for path in (Path(directory), home, *home.rglob("*")):
            os.chown(path, 1000, 1000)
        monkeypatch.chdir(home)
        opening = ("-k", "kek.jwk", "--pin", digest)
        for program, *words in (
            ("imagetool", "encrypt", "data", "oci:b:t", "-r", "kek.jwk"),
            ("imagetool", "decrypt", "oci:a:t", "out", *opening),
            ("encfs", "extract", "oci:a:t", "extracted", *opening),
        ):
            user = ("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups")
            soft, hard, dumpable, _ = protection(program, *words, prefix=user)
            assert (soft, hard, dumpable) == (0, 0, 0), words
        assert (home / "out" / "file").read_bytes() == (home / "extracted" / "file").read_bytes() == b"content"
        monkeypatch.chdir(place)


def test_the_broker_and_its_workers_are_protected(tmp_path: Path) -> None:
    with serving(make_broker(tmp_path / "b", "--host", "127.0.0.1")) as served:
        for pid in (served.process.pid, *served.workers()):
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)
            locked = re.search(r"^VmLck:\s+(\d+) kB", status_of(pid), re.MULTILINE)
            assert locked is not None
            assert int(locked[1]) > 1024 or os.geteuid() != 0
