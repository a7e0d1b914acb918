"""What is left of a command that is ended on its way: nothing, and what was there before is still there."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import pytest

SIZE = 128 << 20
PIECE = 8 << 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file that takes a while."""
    path = tmp_path_factory.mktemp("large") / "large"
    with path.open("wb") as stream:
        for _ in range(0, SIZE, PIECE):
            stream.write(os.urandom(PIECE))
    return str(path)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory with a key and a small artifact under the tag `v1` that is to survive."""
    _ok(tmp_path, "keygen", "-o", "key.jwk")
    (tmp_path / "small").write_text("first\n")
    _ok(tmp_path, "encrypt", "small", "oci:store:v1", "-r", "key.jwk.pub")
    return tmp_path


@contextmanager
def _started(path: Path, program: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    code = f"from {program}.cli import main; main()"
    process = subprocess.Popen(
        # Whoever watches it comes first, however busy the machine is: it must not be through before it is interrupted.
        ["nice", "-n", "19", sys.executable, "-c", code, *words],
        cwd=path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ok(path: Path, *words: str) -> str:
    with _started(path, "imagetool", *words) as process:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out


def _wait_for_writes(process: subprocess.Popen[str]) -> None:
    """Until it has written some of its output, which has no name yet (O_TMPFILE) while it is being written."""
    deadline = time.monotonic() + 60
    counters = Path(f"/proc/{process.pid}/io")
    while int(counters.read_text().partition("wchar: ")[2].split()[0]) < PIECE:
        assert process.poll() is None, f"it ended before it was to be ended: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def _sizes(path: Path) -> dict[Path, int]:
    return {one: one.stat().st_size for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_encryption_leaves_nothing(work: Path, large: str, number: signal.Signals) -> None:
    before = _sizes(work)
    with _started(work, "imagetool", "encrypt", large, "oci:store:v1", "-r", "key.jwk.pub") as process:
        _wait_for_writes(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert out == ""
    assert err == f"imagetool: interrupted by {number.name}\n"
    assert _sizes(work) == before
    assert "small" in _ok(work, "ls", "oci:store:v1", "-k", "key.jwk", "--allow-unsigned", "-q")


def test_a_killed_encryption_leaves_the_tag_alone(work: Path, large: str) -> None:
    with _started(work, "imagetool", "encrypt", large, "oci:store:v1", "-r", "key.jwk.pub") as process:
        _wait_for_writes(process)
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert "small" in _ok(work, "ls", "oci:store:v1", "-k", "key.jwk", "--allow-unsigned", "-q")
    _ok(work, "verify", "oci:store:v1", "-k", "key.jwk")
    document = json.loads(_ok(work, "encrypt", large, "oci:store:v1", "-r", "key.jwk.pub", "--json"))
    assert document["source_size"] == SIZE
    _ok(work, "verify", "oci:store:v1")


def test_what_a_killed_writer_of_an_archive_left_is_removed_by_the_next(work: Path, large: str) -> None:
    words = ("encrypt", large, "oci-archive:out.tar", "-r", "key.jwk.pub")
    before = set(work.iterdir())
    for _ in range(2):
        with _started(work, "imagetool", *words) as process:
            _wait_for_writes(process)
            process.kill()
            process.communicate(timeout=60)
    left = set(work.iterdir()) - before
    assert len(left) == 2, "one that is young may be somebody's who has just begun"
    for path in left:
        os.utime(path / "layout" / "oci-layout", (0, 0))
    # Somebody is at work in one of them.
    busy, stale = sorted(left)
    with (busy / "layout" / "oci-layout").open("rb") as marker:
        fcntl.flock(marker, fcntl.LOCK_SH)
        _ok(work, *words)
    assert set(work.iterdir()) - before == {busy, work / "out.tar"}
    assert not stale.exists()
    _ok(work, "verify", "oci-archive:out.tar", "-k", "key.jwk")


def test_an_interrupted_decryption_leaves_nothing(work: Path, large: str) -> None:
    _ok(work, "encrypt", large, "oci:store:v2", "-r", "key.jwk.pub")
    before = _sizes(work)
    words = ["extract", "oci:store:v2", "out", "-k", "key.jwk", "--allow-unsigned", "-q"]
    with _started(work, "encfs", *words) as process:
        _wait_for_writes(process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[0].startswith("encfs: warning: the artifact's origin is not proven")
    assert _sizes(work) == before
    assert not (work / "out").exists()


def test_a_reader_that_has_enough(work: Path, large: str) -> None:
    _ok(work, "encrypt", large, "oci:store:v2", "-r", "key.jwk.pub")
    words = ["cat", "oci:store:v2", "large", "-k", "key.jwk", "--allow-unsigned", "-q"]
    code = "from encfs.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        with open(large, "rb") as original:
            assert process.stdout.read(1000) == original.read(1000)
        process.stdout.close()
        assert process.wait(timeout=60) == 128 + signal.SIGPIPE
        assert process.stderr.read().count(b"\n") == 1, "the warning, and nothing else"


@pytest.mark.parametrize("program", ["encfs", "imagetool"])
def test_an_interrupt_while_the_program_is_loaded_shows_no_traceback(program: str) -> None:
    code = f"""
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "encfs.console":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from {program}.start import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_the_programs_start_where_that_is_done() -> None:
    """Before the first import that takes time."""
    scripts = {point.name: point.value for point in entry_points(group="console_scripts")}
    assert scripts["encfs"] == "encfs.start:main"
    assert scripts["imagetool"] == "imagetool.start:main"
    assert scripts["mount.fuse.encfs"] == "encfs.start:mount_helper"
