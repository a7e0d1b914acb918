"""What a mount does when bytes do not verify, when a reader has a bug, and when everything has to be waited for."""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from encfs.oci.layout import Layout
from tests.support.artifacts import encrypt_tree, make_keys
from tests.support.mounts import end_mount, known_mounts, make_image, mounted
from tests.support.waiting import LONG, wait_until

pytestmark = [pytest.mark.fuse, pytest.mark.root]

FRAME = 65536


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("tree") / "source"
    source.mkdir()
    (source / "large").write_bytes(random.Random(1).randbytes(4 << 20))
    (source / "small").write_text("small\n")
    (source / "z-directory").mkdir()
    (source / "z-directory" / "below").write_text("below\n")
    return source


@pytest.fixture(scope="module")
def image(tree: Path) -> Path:
    return make_image(tree, tree.parent / "image")


def place_of(image: Path, contents: bytes) -> int:
    """Where these bytes lie in the image."""
    place = image.read_bytes().find(contents)
    assert place > 0
    return place


def assert_fails(descriptor: int, offset: int, size: int = 4096) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - looked at below
        os.pread(descriptor, size, offset)
    assert caught.value.errno == errno.EIO


@pytest.fixture
def opened(image: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, int, bytes]]:
    """(base, descriptor of `large`, its contents) in a mount whose second MiB of `large` has the fault asked for."""
    contents = (image.parent / "source" / "large").read_bytes()
    start = place_of(image, contents[:4096]) + (1 << 20)
    options = [option.format(f"{start}-{start + (1 << 20)}") for option in request.param]
    with mounted(image, tmp_path / "mount", tmp_path / "run", *options):
        descriptor = os.open(tmp_path / "mount" / "large", os.O_RDONLY)
        try:
            yield tmp_path, descriptor, contents
        finally:
            os.close(descriptor)


BROKEN = ["--broken={}"]
BROKEN_COLD = ["--broken={}", "--cold"]
CRASHING = ["--crashing={}"]
CRASHING_COLD = ["--crashing={}", "--cold"]


@pytest.mark.parametrize("opened", [BROKEN, BROKEN_COLD, CRASHING, CRASHING_COLD], indirect=True)
def test_what_cannot_be_read_is_eio_and_the_rest_is_fine(opened: tuple[Path, int, bytes]) -> None:
    _, descriptor, contents = opened
    for offset in range(0, len(contents), FRAME):
        if 1 << 20 <= offset < 2 << 20:
            assert_fails(descriptor, offset)
        else:
            assert os.pread(descriptor, FRAME, offset) == contents[offset : offset + FRAME]


@pytest.mark.parametrize("opened", [BROKEN, BROKEN_COLD], indirect=True)
def test_a_failure_is_counted_and_logged_in_one_line(opened: tuple[Path, int, bytes]) -> None:
    base, descriptor, _ = opened
    for _ in range(20):
        assert_fails(descriptor, (1 << 20) + FRAME)
    (status,) = [status for status in known_mounts(base / "run") if status.mountpoint == str(base / "mount")]
    # The kernel reads ahead, and asks once more for the page alone.
    assert 20 <= status.stats["requests_failed"] <= 50
    lines = [line for line in Path(status.log_file).read_text().splitlines() if "ERROR" in line]
    assert len(lines) == 1
    assert re.search(
        r"ERROR IntegrityError: test volume: frame \d+: its stored bytes are not what the root says$", lines[0]
    )


@pytest.mark.parametrize("opened", [CRASHING, CRASHING_COLD], indirect=True)
def test_a_bug_is_logged_with_its_traceback(opened: tuple[Path, int, bytes]) -> None:
    base, descriptor, contents = opened
    for _ in range(5):
        assert_fails(descriptor, 1 << 20)
    (status,) = [status for status in known_mounts(base / "run") if status.mountpoint == str(base / "mount")]
    text = Path(status.log_file).read_text()
    assert text.count("Traceback") == 1
    assert "ZeroDivisionError: a bug in a volume" in text
    assert os.pread(descriptor, 4096, 0) == contents[:4096]


@pytest.mark.parametrize("cold", [[], ["--cold"]])
def test_broken_metadata_is_eio(image: Path, tmp_path: Path, cold: list[str]) -> None:
    """A directory whose names do not verify: what is below it fails, the rest works, nothing is reported as absent."""
    lookups = tmp_path / "lookups"
    (lookups / "deep").mkdir(parents=True)
    for number in range(4000):
        (lookups / "deep" / f"{number:05}-{'n' * 60}").touch()
    (lookups / "file").write_text("fine\n")
    big = make_image(lookups, tmp_path / "big")
    place = place_of(big, b"n" * 60 + b"02000-")
    with mounted(big, tmp_path / "mount", tmp_path / "run", f"--broken={place}-{place + 1}", *cold):
        assert (tmp_path / "mount" / "file").read_text() == "fine\n"
        for call in (
            lambda: os.listdir(tmp_path / "mount" / "deep"),
            lambda: os.stat(tmp_path / "mount" / "deep" / f"02000-{'n' * 60}"),
            lambda: os.stat(tmp_path / "mount" / "deep" / "02000-absent"),
        ):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - looked at below
                call()
            assert caught.value.errno == errno.EIO


def test_a_flipped_bit_of_an_artifact_is_eio(tree: Path, tmp_path: Path) -> None:
    """The real volume: the frame that was altered fails, every other byte is right, and the log names the frame."""
    keys = make_keys(tmp_path)
    result = encrypt_tree(tree, Layout(str(tmp_path / "layout"), create=True), keys)
    segment = max((tmp_path / "layout" / "blobs" / "sha256").iterdir(), key=lambda path: path.stat().st_size)
    with open(segment, "r+b") as file:
        place = 20 * (FRAME + 16) + 1000
        byte = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), place)
    contents = (tree / "large").read_bytes()
    with mounted(
        tmp_path / "layout", tmp_path / "mount", tmp_path / "run", "--key", str(keys.recipient_file)
    ) as status:
        failed = []
        with open(tmp_path / "mount" / "large", "rb") as file:
            for offset in range(0, len(contents), 4096):
                try:
                    assert os.pread(file.fileno(), 4096, offset) == contents[offset : offset + 4096]
                except OSError as error:
                    failed.append((offset, error.errno))
        assert len(failed) in (FRAME // 4096, FRAME // 4096 + 1)
        assert {code for _, code in failed} == {errno.EIO}
        assert failed[-1][0] - failed[0][0] <= FRAME
        assert (tmp_path / "mount" / "small").read_text() == "small\n"
        log = Path(status.log_file).read_text()
        digest = re.escape(result.content.digest)
        line = rf"ERROR IntegrityError: {digest}: frame \d+: its stored bytes are not what the root commits to\n"
        assert len(re.findall(line, log)) == 1
        (now,) = [found for found in known_mounts(tmp_path / "run") if found.pid == status.pid]
        assert now.stats["failures"] >= len(failed)


def test_a_log_file_that_was_asked_for_stays(image: Path, tmp_path: Path) -> None:
    log = tmp_path / "asked.log"
    with mounted(image, tmp_path / "mount", tmp_path / "run", "--log-file", str(log)) as status:
        assert status.log_file == str(log)
        end_mount(tmp_path / "run", tmp_path / "mount")
    assert "mounted" in log.read_text()
    assert "ended" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600
    assert list((tmp_path / "run").iterdir()) == []


def test_waiting_requests_do_not_hold_up_others(image: Path, tmp_path: Path) -> None:
    """While reads wait, what is known is answered, and so is the control socket."""
    with mounted(image, tmp_path / "mount", tmp_path / "run", "--cold", f"--delay={LONG}"):

        def read() -> None:
            with suppress(OSError):
                (tmp_path / "mount" / "large").read_bytes()

        def waits() -> bool:
            known = [one for one in known_mounts(tmp_path / "run") if one.mountpoint == str(tmp_path / "mount")]
            return any(one.state == "serving" and one.stats["requests_waited"] for one in known)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(waits)
        assert os.statvfs(tmp_path / "mount").f_namemax == 255
        assert any(status.state == "serving" for status in known_mounts(tmp_path / "run"))
        assert reader.is_alive()
        end_mount(tmp_path / "run", tmp_path / "mount", force=True)
        reader.join()


def test_a_mount_ends_while_reads_wait(image: Path, tmp_path: Path) -> None:
    """A store that does not answer must not keep a daemon from ending."""
    with mounted(image, tmp_path / "mount", tmp_path / "run", "--cold", f"--delay={2 * LONG}"):
        failures: list[int | None] = []

        def read() -> None:
            try:
                (tmp_path / "mount" / "large").read_bytes()
            except OSError as error:
                failures.append(error.errno)

        reader = threading.Thread(target=read)
        reader.start()
        time.sleep(0.5)
        started = time.monotonic()
        end_mount(tmp_path / "run", tmp_path / "mount", force=True)
        reader.join()
        assert time.monotonic() - started < LONG
        assert failures
        assert failures[0] in {errno.ENOTCONN, errno.ECONNABORTED, errno.EIO}


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """After reading 400 MiB in every way: at most 150 MiB."""
    (tmp_path / "source").mkdir()
    size = 200 << 20
    with open(tmp_path / "source" / "file", "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    for number in range(2000):
        (tmp_path / "source" / f"small-{number}").write_bytes(b"x" * number)
    keys = make_keys(tmp_path)
    encrypt_tree(tmp_path / "source", Layout(str(tmp_path / "layout"), create=True), keys)
    with mounted(
        tmp_path / "layout", tmp_path / "mount", tmp_path / "run", "--key", str(keys.recipient_file)
    ) as status:
        descriptors = [
            os.open(tmp_path / "mount" / "file", os.O_RDONLY | flag) for flag in (0, os.O_DIRECT, os.O_DIRECT)
        ]
        buffer = bytearray(1 << 20)
        for offset in range(0, size, 1 << 20):
            for descriptor in descriptors[:2]:
                assert os.preadv(descriptor, [buffer], offset) == 1 << 20
        for number in range(3000):
            assert os.pread(descriptors[2], 4096, number * 7919 % (size // 4096) * 4096)
        for descriptor in descriptors:
            os.close(descriptor)
        for entry in os.scandir(tmp_path / "mount"):
            assert entry.stat().st_size >= 0
        assert peak_memory(status.pid) <= 150 << 20


def peak_memory(pid: int) -> int:
    """Bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError(f"process {pid} has no memory")
