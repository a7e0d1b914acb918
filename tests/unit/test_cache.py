"""The ciphertext cache on disk: what counts as there, crashes, other processes, eviction, hostile contents."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from encfs.encoding import sha256_digest
from encfs.errors import StorageError
from encfs.oci import cache as module
from encfs.oci.cache import GRAIN, Cache, Tag, open_cache
from encfs.oci.cachedblob import PART_SIZE, CachedBlob
from encfs.oci.options import default_cache_dir
from tests.support.nobody import as_nobody, nobodys_place
from tests.support.waiting import wait_until

MIB = 1 << 20
SIZE = 3 * MIB + 17
CONTENT = random.Random(1).randbytes(SIZE)
DIGEST = sha256_digest(CONTENT)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = open_cache(str(tmp_path / "cache"), 64 * MIB)
    yield cache
    cache.close()


def get(blob: CachedBlob, offset: int, size: int) -> bytes | None:
    buffer = bytearray(size)
    return bytes(buffer) if blob.read_into(offset, memoryview(buffer)) else None


def part_file(cache: Cache, digest: str = DIGEST, part: int = 0) -> Path:
    return Path(cache.directory) / "v1" / "blobs" / f"{digest.removeprefix('sha256:')}.{part}"


def allocated(cache: Cache) -> int:
    return sum(path.stat().st_blocks * 512 for path in Path(cache.directory).rglob("*") if path.is_file())


# -- what is there


def test_ranges_count_in_whole_grains(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    assert blob.missing(0, SIZE) == [(0, SIZE)]
    assert get(blob, 0, 10) is None
    assert blob.write(100, CONTENT[100 : 3 * GRAIN + 5])
    assert blob.missing(0, SIZE) == [(0, GRAIN), (3 * GRAIN, SIZE)]
    assert get(blob, GRAIN, 2 * GRAIN) == CONTENT[GRAIN : 3 * GRAIN]
    assert get(blob, GRAIN - 1, 2) is None
    assert get(blob, 3 * GRAIN - 1, 2) is None
    # The blob's last grain is a short one.
    assert blob.write(SIZE - 17, CONTENT[-17:])
    assert get(blob, SIZE - 5, 5) == CONTENT[-5:]
    assert get(blob, SIZE - 5, 6) is None
    assert blob.missing(SIZE - 20, SIZE) == [((SIZE - 20) // GRAIN * GRAIN, SIZE - 17)]


def test_less_than_a_grain_does_not_count(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    assert blob.write(1, CONTENT[1 : GRAIN + 1])
    assert blob.missing(0, 2 * GRAIN) == [(0, 2 * GRAIN)]
    assert not part_file(cache).exists()


def test_files_are_sparse_and_parted(cache: Cache) -> None:
    size = 3 * PART_SIZE + 100
    blob = CachedBlob(cache, DIGEST, size)
    data = random.Random(2).randbytes(2 * GRAIN)
    assert blob.write(PART_SIZE - GRAIN, data)
    assert get(blob, PART_SIZE - GRAIN, 2 * GRAIN) == data
    assert blob.missing(PART_SIZE - 2 * GRAIN, PART_SIZE + 2 * GRAIN) == [
        (PART_SIZE - 2 * GRAIN, PART_SIZE - GRAIN),
        (PART_SIZE + GRAIN, PART_SIZE + 2 * GRAIN),
    ]
    assert blob.missing(0, size) == [(0, PART_SIZE - GRAIN), (PART_SIZE + GRAIN, size)]
    assert blob.write(size - 100, data[:100])
    assert part_file(cache, part=3).stat().st_size == GRAIN + 1
    assert allocated(cache) < MIB


def test_it_survives_its_process(cache: Cache) -> None:
    CachedBlob(cache, DIGEST, SIZE).write(0, CONTENT)
    cache.write_document(b"{}")
    cache.write_tag(Tag("docker://host/repository:v1", DIGEST))
    cache.close()
    cache.close()
    again = open_cache(cache.directory, 64 * MIB)
    blob = CachedBlob(again, DIGEST, SIZE)
    assert get(blob, 0, SIZE) == CONTENT
    assert again.read_document(sha256_digest(b"{}"), 100) == b"{}"
    assert again.read_tag("docker://host/repository:v1") == Tag("docker://host/repository:v1", DIGEST)
    assert again.read_tag("docker://host/repository:v2") is None
    again.close()


def test_reading_without_waiting(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    buffer = memoryview(bytearray(GRAIN))
    assert not blob.try_read_into(0, buffer)
    blob.write(0, CONTENT[: 4 * GRAIN])
    assert blob.try_read_into(GRAIN, buffer)  # it was written just now: it is in memory
    assert buffer == CONTENT[GRAIN : 2 * GRAIN]
    blob.close()
    assert blob.try_read_into(GRAIN, buffer)


# -- crashes and damage


def test_what_was_not_marked_is_not_there(cache: Cache) -> None:
    """A crash between writing bytes and marking them: the bytes do not count."""
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT[:GRAIN])
    with open(part_file(cache), "r+b") as file:
        file.seek(GRAIN)
        file.write(CONTENT[GRAIN : 2 * GRAIN])
    assert blob.missing(0, 2 * GRAIN) == [(GRAIN, 2 * GRAIN)]


KILLED_WRITER = """
import os, sys
from encfs.oci import cache as module
from encfs.oci.cachedblob import CachedBlob
cache = module.open_cache(sys.argv[1], 64 << 20)
real, calls = os.pwrite, 0
def pwrite(file, data, offset):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        real(file, data[: len(data) // 2], offset)
        os.kill(os.getpid(), 9)
    return real(file, data, offset)
os.pwrite = pwrite
blob = CachedBlob(cache, "sha256:" + sys.argv[3], 1 << 20)
for start in range(0, 1 << 20, 1 << 18):
    blob.write(start, bytes([1 + (start >> 18)]) * (1 << 18))
"""


@pytest.mark.parametrize("call", range(1, 9))
def test_a_writer_killed_in_the_middle(cache: Cache, call: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITER, cache.directory, str(call), "ab" * 32], check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    blob = CachedBlob(cache, "sha256:" + "ab" * 32, MIB)
    gaps = blob.missing(0, MIB)
    assert gaps
    # Whatever counts as there is right, and what is not can be written.
    for offset in range(0, MIB, GRAIN):
        expected = bytes([1 + (offset >> 18)]) * GRAIN
        if not any(start <= offset < end for start, end in gaps):
            assert get(blob, offset, GRAIN) == expected
    for start, end in gaps:
        assert blob.write(start, b"x" * (end - start))
    assert blob.missing(0, MIB) == []


def test_dropping_forgets_the_grains_that_are_touched(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)
    blob.drop(GRAIN + 1, GRAIN)
    assert blob.missing(0, SIZE) == [(GRAIN, 3 * GRAIN)]
    assert get(blob, 3 * GRAIN, GRAIN) == CONTENT[3 * GRAIN : 4 * GRAIN]
    other = open_cache(cache.directory, 64 * MIB)
    assert CachedBlob(other, DIGEST, SIZE).missing(0, SIZE) == [(GRAIN, 3 * GRAIN)]
    other.close()
    blob.drop(0, SIZE)
    assert blob.missing(0, SIZE) == [(0, SIZE)]
    CachedBlob(cache, "sha256:" + "0" * 64, SIZE).drop(0, SIZE)


def test_a_part_that_cannot_be_marked_is_removed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        blob.drop(0, GRAIN)
    assert not part_file(cache).exists()
    assert blob.missing(0, SIZE) == [(0, SIZE)]


def test_a_damaged_document_is_removed(cache: Cache) -> None:
    cache.write_document(b"a document")
    path = Path(cache.directory) / "v1" / "documents" / hashlib.sha256(b"a document").hexdigest()
    path.write_bytes(b"b document")
    assert cache.read_document(sha256_digest(b"a document"), 100) is None
    assert not path.exists()
    cache.write_document(b"a document")
    assert cache.read_document(sha256_digest(b"a document"), 9) is None
    assert cache.read_document(sha256_digest(b"a document"), 10) == b"a document"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"reference":"r"}', b'{"reference":"other","digest":"D"}'])
def test_a_damaged_tag_is_none(cache: Cache, content: bytes) -> None:
    cache.write_tag(Tag("r", DIGEST))
    [path] = (Path(cache.directory) / "v1" / "tags").iterdir()
    assert json.loads(path.read_bytes()) == {"reference": "r", "digest": DIGEST}
    path.write_bytes(content.replace(b"D", DIGEST.encode()))
    assert cache.read_tag("r") is None


# -- several processes

WRITER = """
import sys
from encfs.oci.cache import open_cache
from encfs.oci.cachedblob import CachedBlob
cache = open_cache(sys.argv[1], 64 << 20)
blob = CachedBlob(cache, "sha256:" + "cd" * 32, 8 << 20)
number = int(sys.argv[2])
for start in range(number * 4096, 8 << 20, 3 * 4096):
    assert blob.write(start, (start >> 12).to_bytes(4, "big") * 1024)
cache.close()
"""


def test_processes_write_to_one_part_at_the_same_time(cache: Cache) -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, cache.directory, str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    blob = CachedBlob(cache, "sha256:" + "cd" * 32, 8 * MIB)
    assert blob.missing(0, 8 * MIB) == []
    for start in range(0, 8 * MIB, GRAIN):
        assert get(blob, start, GRAIN) == (start >> 12).to_bytes(4, "big") * 1024
    assert not [path for path in (Path(cache.directory) / "v1" / "blobs").iterdir() if path.name.startswith(".")]


def test_what_another_process_fetched_is_seen_at_once(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    other = open_cache(cache.directory, 64 * MIB)
    assert get(blob, 0, GRAIN) is None
    CachedBlob(other, DIGEST, SIZE).write(0, CONTENT)
    assert get(blob, 0, SIZE) == CONTENT
    other.close()


# -- size


def test_the_size_is_bounded_and_the_least_used_goes(tmp_path: Path) -> None:
    cache = open_cache(str(tmp_path / "cache"), 8 * MIB)
    kept = CachedBlob(cache, "sha256:" + "11" * 32, MIB)
    kept.write(0, bytes(MIB))
    cache.write_document(b"the manifest")
    long_ago = time.time() - 1000
    for number in range(40):
        digest = f"sha256:{number + 100:064x}"
        CachedBlob(cache, digest, MIB).write(0, random.Random(number).randbytes(MIB))
        os.utime(part_file(cache, digest), (long_ago + number, long_ago + number))
        assert allocated(cache) <= 8 * MIB
    assert get(kept, 0, MIB) == bytes(MIB), "it was the one used last"
    there = [number for number in range(40) if part_file(cache, f"sha256:{number + 100:064x}").exists()]
    assert there == list(range(there[0], 40)), "the oldest go first"
    assert len(there) >= 4
    assert cache.read_document(sha256_digest(b"the manifest"), 100) == b"the manifest"
    cache.close()


def test_a_blob_larger_than_the_cache(tmp_path: Path) -> None:
    cache = open_cache(str(tmp_path / "cache"), 2 * MIB)
    blob = CachedBlob(cache, DIGEST, 32 * MIB)
    for start in range(0, 32 * MIB, MIB):
        blob.write(start, random.Random(start).randbytes(MIB))
        assert allocated(cache) <= 3 * MIB
    cache.close()


def test_eviction_frees_space_and_readers_find_nothing_wrong(tmp_path: Path) -> None:
    cache, other = (open_cache(str(tmp_path / "cache"), 8 * MIB) for _ in range(2))
    blob, same = CachedBlob(cache, DIGEST, SIZE), CachedBlob(other, DIGEST, SIZE)
    blob.write(0, CONTENT)
    assert get(same, 0, SIZE) == CONTENT  # both have the file open
    for number in range(12):
        os.utime(part_file(cache), (1, 1)) if part_file(cache).exists() else None
        CachedBlob(cache, f"sha256:{number:064x}", MIB).write(0, bytes(range(256)) * (MIB // 256))
    assert not part_file(cache).exists()
    held = sum(os.stat(f"/proc/self/fd/{name}").st_blocks for name in open_names() if "(deleted)" in target(name))
    assert held == 0, "no descriptor keeps evicted bytes on the disk"
    for reader in (blob, same):
        assert get(reader, 0, GRAIN) is None
        assert reader.missing(0, SIZE) == [(0, SIZE)]
    assert same.write(0, CONTENT)
    assert get(same, 0, SIZE) == CONTENT
    assert blob.write(0, CONTENT[:GRAIN])  # finds that its file is gone, and the new one
    assert get(blob, 0, SIZE) == CONTENT
    cache.close()
    other.close()


def open_names() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}") or target(name)]


def target(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return ""


def test_eviction_under_busy_readers_and_writers(tmp_path: Path) -> None:
    """What is read is right, or not there, whatever eviction does meanwhile."""
    cache = open_cache(str(tmp_path / "cache"), 2 * MIB)
    stopped = threading.Event()
    wrong: list[int] = []
    reads = [0]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        while not stopped.is_set():
            number = chance.randrange(6)
            blob = CachedBlob(cache, f"sha256:{number + 1:064x}", MIB)
            start = chance.randrange(0, 12) * 65536
            if chance.random() < 0.4:
                blob.write(start, bytes([number + 1]) * 65536)
            elif (data := get(blob, start, 65536)) is not None:
                reads[0] += 1
                # A part that was emptied and filled again under an open descriptor may show zeros: readers check.
                if data.strip(bytes([number + 1])).strip(b"\0"):
                    wrong.append(number)
            blob.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(1.5)
    wait_until(lambda: reads[0] > 10)
    stopped.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert allocated(cache) <= 3 * MIB
    cache.close()


def evict_all(cache: Cache) -> None:
    for item in cache._scan():
        cache._remove(item)


def test_what_is_evicted_while_it_is_being_written_is_not_read(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are cut off before they are marked: the marks make a file of them that has a hole where they were."""
    blob = CachedBlob(cache, DIGEST, SIZE)
    assert blob.write(2 * MIB, CONTENT[2 * MIB :])
    pwrite = os.pwrite

    def evicted_before_the_marks(file: int, data: bytes, offset: int) -> int:
        if offset >= SIZE:
            monkeypatch.setattr(os, "pwrite", pwrite)
            evict_all(cache)
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", evicted_before_the_marks)
    blob.write(0, CONTENT[:MIB])
    assert get(blob, 0, GRAIN) in (None, CONTENT[:GRAIN])
    assert get(blob, 0, GRAIN) is None
    assert blob.missing(0, SIZE) == [(0, SIZE)]
    assert blob.write(0, CONTENT)
    assert get(blob, 0, SIZE) == CONTENT


def test_a_part_that_is_evicted_while_it_is_opened_leaves_its_successor(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)
    size = part_file(cache).stat().st_size
    fstat = os.fstat

    def replaced_meanwhile(file: int) -> os.stat_result:
        monkeypatch.setattr(os, "fstat", fstat)
        evict_all(cache)
        cache.create_part(part_file(cache).name, size)
        return fstat(file)

    monkeypatch.setattr(os, "fstat", replaced_meanwhile)
    with pytest.raises(FileNotFoundError):
        cache.open_part(part_file(cache).name, size)
    assert part_file(cache).stat().st_size == size
    assert not caplog.records


def test_an_eviction_that_was_cut_short_leaves_nothing_that_counts(cache: Cache) -> None:
    CachedBlob(cache, DIGEST, SIZE).write(0, CONTENT)
    cache.files.close()
    part_file(cache).chmod(0o400)
    blob = CachedBlob(cache, DIGEST, SIZE)
    assert get(blob, 0, SIZE) is None
    assert blob.missing(0, SIZE) == [(0, SIZE)]
    assert blob.write(0, CONTENT)
    assert get(blob, 0, SIZE) == CONTENT


@pytest.mark.root
def test_an_eviction_that_was_cut_short_does_not_stop_the_next_ones() -> None:
    """Only an ordinary user cannot open what the first one left."""
    with nobodys_place() as place, as_nobody():
        cache = open_cache(str(place / "cache"), 3 * MIB)
        CachedBlob(cache, DIGEST, SIZE).write(0, CONTENT[:MIB])
        left = part_file(cache)
        left.chmod(0o400)
        os.utime(left, (1, 1))
        other = sha256_digest(b"another blob")
        CachedBlob(cache, other, SIZE).write(0, CONTENT[: 2 * MIB])
        assert not left.exists()
        assert allocated(cache) < 3 * MIB
        cache.close()


def test_a_thread_that_outlives_the_cache_touches_no_file_of_others(cache: Cache, tmp_path: Path) -> None:
    cache.write_document(b"early")
    cache.close()
    others = [os.open(tmp_path, os.O_RDONLY) for _ in range(8)]
    cache.write_document(b"late")
    assert cache.read_document(sha256_digest(b"late"), 100) is None
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        cache.create_part("part", GRAIN)
    for other in others:
        os.close(other)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_being_written_is_not_evicted(tmp_path: Path) -> None:
    cache = open_cache(str(tmp_path / "cache"), MIB)
    folder = Path(cache.directory) / "v1" / "blobs"
    descriptor = os.open(folder, os.O_RDONLY)
    with cache._new_file(descriptor) as (file, name):
        os.write(file, CONTENT)
        cache.evict()
        assert (folder / name).exists()
    os.close(descriptor)
    cache.close()


def test_only_one_process_evicts(cache: Cache, tmp_path: Path) -> None:
    import fcntl

    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)
    small = open_cache(cache.directory, MIB)
    lock = os.open(tmp_path / "cache" / "v1", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    small.evict()
    assert get(blob, 0, SIZE) == CONTENT
    os.close(lock)
    small.evict()
    assert get(blob, 0, GRAIN) is None
    small.close()


# -- a full or broken disk


def test_a_full_disk_is_said_once_and_otherwise_a_miss(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT[:GRAIN])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        for number in range(1, 5):
            assert not blob.write(number * GRAIN, CONTENT[number * GRAIN : (number + 1) * GRAIN])
        patch.setattr(os, "write", full)
        cache.write_document(b"x")
    assert [record.message for record in caplog.records] == [
        f"the cache in {cache.directory} cannot be written: No space left on device; going on without it"
    ]
    assert get(blob, 0, GRAIN) == CONTENT[:GRAIN], "what is there is still used"
    assert not blob.write(GRAIN, CONTENT[GRAIN : 2 * GRAIN]), "for a while, it is not tried again"
    monkeypatch.setattr(cache, "_paused_until", 0.0)
    assert blob.write(GRAIN, CONTENT[GRAIN : 2 * GRAIN])


def test_a_really_full_filesystem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(place)], check=True)
    try:
        cache = open_cache(str(place / "cache"), 64 * MIB)
        blob = CachedBlob(cache, DIGEST, SIZE)
        results = [
            blob.write(start, CONTENT[start : start + 65536]) for start in range(0, SIZE // 65536 * 65536, 65536)
        ]
        assert results[0]
        assert not results[-1]
        assert "No space left on device" in caplog.text
        for start, kept in zip(range(0, SIZE, 65536), results, strict=False):
            found = get(blob, start, 65536)
            assert found == CONTENT[start : start + 65536] if kept else found is None
        cache.close()
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_cache_that_is_deleted_while_it_is_used(cache: Cache) -> None:
    import shutil

    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)
    shutil.rmtree(cache.directory)
    assert get(blob, 0, SIZE) == CONTENT, "an open descriptor stays valid"
    blob.close()
    assert get(blob, 0, GRAIN) is None
    assert not blob.write(0, CONTENT)


# -- hostile directories


def test_directories_are_private(cache: Cache, tmp_path: Path) -> None:
    for path in (tmp_path / "cache", tmp_path / "cache" / "v1", *(tmp_path / "cache" / "v1").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    CachedBlob(cache, DIGEST, SIZE).write(0, CONTENT)
    assert stat.S_IMODE(part_file(cache).stat().st_mode) == 0o600


@pytest.mark.parametrize("level", ["", "v1", "v1/blobs", "v1/documents", "v1/tags"])
def test_links_other_users_and_open_modes_are_refused(tmp_path: Path, level: str) -> None:
    open_cache(str(tmp_path / "cache"), MIB).close()
    place = tmp_path / "cache" / level
    os.chmod(place, 0o750)  # noqa: S103
    with pytest.raises(StorageError, match="its mode must be 700"):
        open_cache(str(tmp_path / "cache"), MIB)
    os.chmod(place, 0o700)
    if os.geteuid() == 0:
        os.chown(place, 4711, -1)
        with pytest.raises(StorageError, match=r"belongs to another user \(uid 4711\)") as caught:
            open_cache(str(tmp_path / "cache"), MIB)
        assert "--cache-dir" in str(caught.value)
        os.chown(place, 0, -1)
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="it is a link or no directory"):
        open_cache(str(tmp_path / "cache"), MIB)
    place.unlink()
    place.write_bytes(b"")
    with pytest.raises(StorageError, match="it is a link or no directory"):
        open_cache(str(tmp_path / "cache"), MIB)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be used"):
        open_cache(str(tmp_path / "file" / "cache"), MIB)


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "directory", "short", "long", "empty"])
def test_what_stands_in_place_of_a_part_is_removed(cache: Cache, tmp_path: Path, kind: str) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = part_file(cache)
    match kind:
        case "link":
            path.symlink_to(victim)
        case "dangling":
            path.symlink_to(tmp_path / "nothing")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.write_bytes(b"\1" * {"short": 10, "long": 2 * SIZE, "empty": 0}[kind])
    blob = CachedBlob(cache, DIGEST, SIZE)
    assert get(blob, 0, GRAIN) is None
    assert blob.write(0, CONTENT)
    assert get(blob, 0, SIZE) == CONTENT
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "nothing").exists()


def test_odd_map_bytes_mean_absent(cache: Cache) -> None:
    blob = CachedBlob(cache, DIGEST, SIZE)
    blob.write(0, CONTENT)
    grains = -(-SIZE // GRAIN)
    with open(part_file(cache), "r+b") as file:
        file.seek(grains * GRAIN)
        file.write(b"\xff\x02")
    assert blob.missing(0, SIZE) == [(0, 2 * GRAIN)]
    assert get(blob, 0, GRAIN) is None


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "huge"])
def test_what_stands_in_place_of_a_document_is_none(cache: Cache, tmp_path: Path, kind: str) -> None:
    (tmp_path / "victim").write_bytes(b"a document")
    path = Path(cache.directory) / "v1" / "documents" / hashlib.sha256(b"a document").hexdigest()
    match kind:
        case "link":
            path.symlink_to(tmp_path / "victim")
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "huge":
            path.touch()
            os.truncate(path, 1 << 40)
    assert cache.read_document(sha256_digest(b"a document"), 1000) is None
    cache.evict()


def test_strays_are_swept(cache: Cache) -> None:
    folder = Path(cache.directory) / "v1" / "blobs"
    (folder / ".new-0123").write_bytes(b"left by a crash")
    os.utime(folder / ".new-0123", (1, 1))
    (folder / ".new-4567").write_bytes(b"being written")
    (folder / "link").symlink_to("/etc/passwd")
    cache.evict()
    assert [path.name for path in folder.iterdir()] == [".new-4567"]
    assert Path("/etc/passwd").exists()


def test_names_are_digests(cache: Cache) -> None:
    for digest in ("sha256:../../x", "sha256:" + "A" * 64, "md5:" + "0" * 32, ""):
        with pytest.raises(Exception, match="digest"):
            CachedBlob(cache, digest, SIZE)
        with pytest.raises(Exception, match="digest"):
            cache.read_document(digest, 10)


def test_default_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == str(tmp_path / "encfs")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_cache_dir() == "/home/somebody/.cache/encfs"


def test_many_files_are_few_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILES", 16)
    for number in range(20):
        cache.write_document(b"%d" % number)
    cache.evict()
    assert len(list((Path(cache.directory) / "v1" / "documents").iterdir())) <= 16
