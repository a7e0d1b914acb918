"""`encfs.open` and `encfs.aio`: the files of an artifact without a mount."""

from __future__ import annotations

import gc
import io
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio

import encfs.aio
from encfs.api import Artifact
from encfs.errors import (
    EncfsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RollbackError,
    SourceError,
    UnsignedError,
    WrongIdError,
)
from encfs.format.volume import VolumeReader
from tests.support.opened import Stored, store_tree
from tests.support.trees import assert_same, scan_tree
from tests.support.waiting import LONG

LARGE = 9_000_001


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("api") / "tree"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "small.txt").write_bytes(b"the quick brown fox\n")
    (root / "empty").touch()
    (root / "large.bin").write_bytes(os.urandom(LARGE))
    (root / "sub" / "deep" / "x").write_bytes(b"x" * 5000)
    (root / "link").symlink_to("sub/deep/x")
    (root / "dangling").symlink_to("nowhere")
    with (root / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    os.mkfifo(root / "pipe")
    (root / os.fsdecode(b"\xff\xfe")).write_bytes(b"odd")
    return root


@pytest.fixture(scope="module")
def stored(tree: Path) -> Stored:
    return store_tree(tree, tree.parent)


@pytest.fixture
def artifact(stored: Stored) -> Artifact:
    with stored.open() as opened:
        yield opened


def test_lists_and_stats_as_the_source(tree: Path, artifact: Artifact) -> None:
    assert [entry.path for entry in artifact.list()] == sorted(os.listdir(tree), key=os.fsencode)
    below = {entry.path: entry for entry in artifact.list(recursive=True)}
    assert {"sub", "sub/deep", "sub/deep/x"} <= below.keys()
    assert [entry.path for entry in artifact.list("/sub/deep/")] == ["sub/deep/x"]
    for path, entry in below.items():
        status = os.lstat(tree / path)
        assert (entry.size, entry.mode, entry.mtime_ns, entry.uid) == (
            status.st_size if entry.kind in ("file", "symlink") else entry.size,
            status.st_mode & 0o7777,
            status.st_mtime_ns,
            status.st_uid,
        )
    assert below["link"].target == "sub/deep/x"
    assert below["pipe"].kind == "fifo"
    assert artifact.stat("link").size == 5000
    assert artifact.stat("link", follow_symlinks=False).kind == "symlink"
    assert artifact.stat("link").is_file
    assert artifact.stat("").is_directory
    assert artifact.exists("sub/deep")
    assert not artifact.exists("dangling")


def test_reads_any_range(tree: Path, artifact: Artifact) -> None:
    content = (tree / "large.bin").read_bytes()
    assert artifact.read("large.bin") == content
    assert artifact.read("large.bin", 4_194_303, 2) == content[4_194_303:4_194_305]
    assert artifact.read("large.bin", LARGE - 5) == content[-5:]
    assert artifact.read("large.bin", LARGE + 5) == b""
    assert artifact.read("empty") == b""
    assert artifact.read(b"\xff\xfe") == b"odd"
    assert artifact.read("sparse") == bytes(3 << 20) + b"end"
    buffer = bytearray(b"#" * 3_000_000)
    assert artifact.read_into("large.bin", LARGE - 2_000_000, buffer) == 2_000_000
    assert buffer[:2_000_000] == content[-2_000_000:]
    assert buffer[2_000_000:] == b"#" * 1_000_000


def test_files_are_seekable(tree: Path, artifact: Artifact) -> None:
    content = (tree / "large.bin").read_bytes()
    with artifact.open("large.bin") as file:
        assert file.seek(-10, io.SEEK_END) == LARGE - 10
        assert file.read() == content[-10:]
        file.seek(5)
        assert file.read(7) == content[5:12]
        assert file.seek(3, io.SEEK_CUR) == 15
        with pytest.raises(ValueError, match="before the file"):
            file.seek(-1)
    with artifact.open_raw("large.bin") as raw:
        buffer = bytearray(LARGE + 100)
        assert raw.readinto(buffer) == LARGE
        assert raw.readinto(buffer) == 0
        assert not raw.writable()
    with pytest.raises(ValueError, match="closed"):
        raw.read(1)
    with artifact.open("small.txt") as file:
        assert io.TextIOWrapper(file, "utf-8").readline() == "the quick brown fox\n"


def test_what_is_no_file_is_said(artifact: Artifact) -> None:
    for action in (artifact.read, artifact.open):
        with pytest.raises(SourceError, match="directory, not a regular file"):
            action("sub")
        with pytest.raises(SourceError, match="fifo, not a regular file"):
            action("pipe")
        with pytest.raises(NotFoundError):
            action("nothing/here")
    with pytest.raises(SourceError, match="no directory"):
        artifact.list("small.txt")
    with pytest.raises(NotFoundError):
        artifact.list("nothing")
    with pytest.raises(ValueError, match="negative"):
        artifact.read("small.txt", -1)
    with pytest.raises(FormatError, match="beyond its end"):
        artifact.files.read_many("small.txt", [(15, memoryview(bytearray(10)))])


def test_extracts(tree: Path, artifact: Artifact, tmp_path: Path) -> None:
    artifact.extract(tmp_path / "out")
    assert_same(scan_tree(tree), scan_tree(tmp_path / "out"))


def test_many_threads_read_at_once(tree: Path, artifact: Artifact) -> None:
    content = (tree / "large.bin").read_bytes()

    def check(seed: int) -> bool:
        offset = seed * 400_009 % LARGE
        return artifact.read("large.bin", offset, 1_500_000) == content[offset : offset + 1_500_000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(40)))


def test_trust_is_asked_for_as_by_the_mount(stored: Stored) -> None:
    with pytest.raises(UnsignedError):
        encfs.open(stored.reference, key=stored.options["key"])
    with pytest.raises(WrongIdError):
        stored.open(id="other/model")
    with pytest.raises(RollbackError):
        stored.open(min_version=2)
    with stored.open(trust=[stored.options["trust"]], pin=None) as artifact:
        digest = artifact.content_digest
        assert artifact.origin.proven
        assert artifact.version == 1
        assert digest in repr(artifact)
    with encfs.open(stored.reference, key=[stored.options["key"]], pin=digest) as artifact:
        assert artifact.origin.pinned
    with encfs.open(stored.reference, key=stored.options["key"], allow_unsigned=True) as artifact:
        assert not artifact.origin.proven


def test_a_changed_byte_wipes_what_was_asked_for(tree: Path, tmp_path: Path) -> None:
    stored = store_tree(tree, tmp_path)
    size = max(path.stat().st_size for path in (stored.layout / "blobs" / "sha256").iterdir())
    stored.flip_byte(0, size // 2)
    with stored.open() as artifact:
        buffer = bytearray(b"#" * LARGE)
        with pytest.raises(IntegrityError, match="frame"):
            artifact.read_into("large.bin", 0, buffer)
        assert buffer == bytes(LARGE)
        with pytest.raises(IntegrityError):
            artifact.open("large.bin").read()
        # The rest is still served.
        assert artifact.read("small.txt") == b"the quick brown fox\n"


def test_errors_survive_pickling_between_processes(artifact: Artifact) -> None:
    with pytest.raises(NotFoundError) as caught:
        artifact.read("nothing")
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - made here
    assert str(again) == str(caught.value)


def test_threads_end_with_the_artifact(stored: Stored) -> None:
    before = threading.active_count()
    with stored.open(threads=3) as artifact:
        artifact.read("large.bin")
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_what_is_read_after_the_end_starts_no_threads(stored: Stored) -> None:
    before = threading.active_count()
    with stored.open(threads=3) as artifact:
        pass
    with pytest.raises(EncfsError):
        artifact.read("large.bin")
    assert threading.active_count() == before


def test_closing_ends_reads_that_are_under_way(stored: Stored) -> None:
    """Pieces that no thread had begun were dropped, and who waited for them waited for ever."""
    ends: list[EncfsError] = []
    artifact = stored.open(threads=2)
    reading = threading.Barrier(5)

    def read() -> None:
        reading.wait(60)
        try:
            while True:
                artifact.read("large.bin")
        except EncfsError as error:
            ends.append(error)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(4)]
    for reader in readers:
        reader.start()
    reading.wait(60)
    while artifact._opened.volumes[0].stats.bytes_read < 2 * LARGE:
        time.sleep(0.001)
    artifact.close()
    for reader in readers:
        reader.join(60)
    assert len(ends) == 4


def test_one_that_is_forgotten_is_closed(stored: Stored) -> None:
    """Descriptors and threads would pile up in a process that runs for long."""

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    gc.collect()
    before = held()
    for _ in range(3):
        artifact = stored.open(threads=2)
        artifact.read("large.bin")
        file = artifact.open("small.txt")
        assert file.read(3) == b"the"
    del artifact, file
    deadline = time.monotonic() + 60
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline
        gc.collect()
        time.sleep(0.01)


def test_a_cancelled_read_is_not_waited_for(stored: Stored, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a registry does not answer."""
    released = threading.Event()
    read = VolumeReader.read_into

    def blocked(volume: VolumeReader, offset: int, buffer: memoryview) -> int:
        released.wait(LONG)
        return read(volume, offset, buffer)

    async def main() -> None:
        async with await encfs.aio.open(stored.reference, **stored.options) as artifact:
            monkeypatch.setattr(VolumeReader, "read_into", blocked)
            with trio.move_on_after(0.2) as scope:
                await artifact.read("large.bin", 0, 10_000)
            assert scope.cancelled_caught
            released.set()

    started = time.monotonic()
    trio.run(main)
    assert time.monotonic() - started < LONG


def test_trio_variant(stored: Stored, tree: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with await encfs.aio.open(stored.reference, **stored.options) as artifact:
            names = [entry.path for entry in await artifact.list(recursive=True)]
            assert "sub/deep/x" in names
            assert (await artifact.stat("large.bin")).size == LARGE
            assert await artifact.exists("small.txt")
            assert await artifact.read("large.bin", 7, 9) == (tree / "large.bin").read_bytes()[7:16]
            buffer = bytearray(10)
            assert await artifact.read_into("large.bin", 0, buffer) == 10
            async with await artifact.open("small.txt") as file:
                assert await file.read(9) == b"the quick"
            await artifact.extract(tmp_path / "out")
            with pytest.raises(NotFoundError):
                await artifact.read("nothing")

    trio.run(main)
    assert (tmp_path / "out" / "small.txt").exists()


def test_nothing_is_written(artifact: Artifact) -> None:
    with artifact.open("small.txt") as file, pytest.raises(io.UnsupportedOperation):
        file.write(b"x")
